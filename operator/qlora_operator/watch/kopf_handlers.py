"""kopf's part: watch QLoRAJobs, and let each event wake one reconcile. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qlora_api.job import GROUP, VERSION
from qlora_operator.kube.client import SILENCE_SECONDS, WATCH_SECONDS
from qlora_operator.kube.kopf_import import kopf
from qlora_operator.state.cache import Key, ObjectCache

WATCHED = ("qlorajobs", "jobs", "pods", "events", "services")
"""By kopf, and by ``list_watch.py``."""
LIST_CHUNK = 20
"""kopf reads a page at once, and each job may be as large as etcd takes it."""


class NoDiffBase(kopf.DiffBaseStorage):
    """Nothing here looks at differences, so nothing is copied and stored to find them."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


def settings() -> kopf.OperatorSettings:
    """Configure how kopf watches: with time limits everywhere, and without writes of its own."""
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False
    chosen.scanning.disabled = True
    chosen.peering.standalone = True
    chosen.persistence.diffbase_storage = NoDiffBase()
    chosen.watching.server_timeout = WATCH_SECONDS
    chosen.watching.inactivity_timeout = SILENCE_SECONDS
    chosen.watching.connect_timeout = 10
    chosen.watching.chunk_size = LIST_CHUNK
    chosen.networking.request_timeout = 60
    chosen.networking.connect_timeout = 10
    chosen.queueing.idle_timeout = 0.1  # a task of kopf's keeps its object's whole body until then
    return chosen


def register(registry: kopf.OperatorRegistry, store: ObjectCache, wake: Callable[[Key], None]) -> None:
    """Feed the store and wake jobs."""

    @kopf.on.event(GROUP, VERSION, "qlorajobs", registry=registry, id="qlorajobs")
    async def changed(event: Mapping[str, Any], **_: Any) -> None:
        key = (store.drop_job if event["type"] == "DELETED" else store.take_job)(event["object"])
        if key:
            wake(key)
