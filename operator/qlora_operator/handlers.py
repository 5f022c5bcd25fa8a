"""kopf's part: watch four kinds of objects, and let each event wake one reconcile. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import kopf

from qlora_api.job import GROUP, VERSION
from qlora_operator.health import WATCH_SECONDS
from qlora_operator.names import JOB_LABEL
from qlora_operator.reconcile import Reconciler
from qlora_operator.store import Key, Store

WATCHED = ("qlorajobs", "jobs", "pods", "events")
LIST_CHUNK = 500
SILENCE_SECONDS = 70
"""A watch from which nothing comes for so long is asked for anew; the API server sends a bookmark each minute."""


class NoDiffBase(kopf.DiffBaseStorage):
    """Nothing here looks at differences, so nothing is copied and stored to find them."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


def settings() -> kopf.OperatorSettings:
    """How kopf watches: filtered by the server, with time limits everywhere, and without writes of its own."""
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False
    chosen.scanning.disabled = True
    chosen.peering.standalone = True
    chosen.persistence.diffbase_storage = NoDiffBase()
    chosen.watching.server_timeout = WATCH_SECONDS
    chosen.watching.inactivity_timeout = SILENCE_SECONDS
    chosen.watching.connect_timeout = 10
    chosen.watching.chunk_size = LIST_CHUNK
    chosen.watching.label_selectors["batch", "v1", "jobs"] = JOB_LABEL
    chosen.watching.label_selectors["", "v1", "pods"] = JOB_LABEL
    chosen.watching.field_selectors["", "v1", "events"] = "reason=FailedCreate,involvedObject.kind=Job"
    chosen.networking.request_timeout = 60
    chosen.networking.connect_timeout = 10
    chosen.queueing.idle_timeout = 1
    return chosen


def register(registry: kopf.OperatorRegistry, store: Store, reconciler: Reconciler) -> None:
    """Feed the store and wake the reconciler."""

    def feed(take: Callable[[Any], Key | None], drop: Callable[[Any], Key | None]) -> Callable[..., Awaitable[None]]:
        async def changed(event: Mapping[str, Any], **_: Any) -> None:
            key = (drop if event["type"] == "DELETED" else take)(event["object"])
            if key:
                reconciler.wake(key)

        return changed

    for resource, take, drop in (
        ((GROUP, VERSION, "qlorajobs"), store.take_job, store.drop_job),
        (("batch", "v1", "jobs"), store.take_child, store.drop_child),
        (("", "v1", "pods"), store.take_pod, store.drop_pod),
        # The Job controller says why it cannot make pods in Events, and nowhere else.
        (("", "v1", "events"), store.take_refusal, lambda _: None),
    ):
        kopf.on.event(*resource, registry=registry, id=resource[2])(feed(take, drop))
