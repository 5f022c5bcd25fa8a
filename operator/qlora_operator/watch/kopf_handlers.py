"""kopf's part: watch QLoRAJobs, and let each event wake one reconcile. Nothing is decided here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from qlora_api.job import GROUP, VERSION
from qlora_operator.kube.client import SILENCE_SECONDS, WATCH_SECONDS
from qlora_operator.kube.kopf_import import kopf
from qlora_operator.state.cache import Key, ObjectCache
from qlora_operator.watch.kopf_session import kept_in

WATCHED = ("qlorajobs", "qlorasweeps", "jobs", "pods", "events", "services")
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


def configure(settings: kopf.OperatorSettings) -> None:
    """Configure how kopf watches: with time limits everywhere, and without writes of its own."""
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.watching.server_timeout = WATCH_SECONDS
    settings.watching.inactivity_timeout = SILENCE_SECONDS
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = LIST_CHUNK
    settings.networking.request_timeout = 60
    settings.networking.connect_timeout = 10
    settings.queueing.idle_timeout = 0.1  # a task of kopf's keeps its object's whole body until then


def handlers(
    cache: ObjectCache,
    wake: Callable[[Key], None],
    listed: asyncio.Event,
    login: Callable[[], Awaitable[kopf.AiohttpSession]],
) -> kopf.OperatorRegistry:
    """Return kopf's handlers, which fill the cache and wake jobs.

    Args:
        cache: what is known.
        wake: told the key of each job that has changed.
        listed: set once everything was listed; nothing is watched before.
        login: returns a session with valid credentials, at the start and when the API server refuses those it has.

    """
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry, id="initial-sync")
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        await listed.wait()

    @kopf.on.login(registry=registry, id="login")
    async def log_in(**_: Any) -> kopf.AiohttpSession:
        return await login()

    @kopf.on.event(GROUP, VERSION, "qlorajobs", registry=registry, id="qlorajobs")
    async def changed(event: Mapping[str, Any], **_: Any) -> None:
        key = (cache.drop_job if event["type"] == "DELETED" else cache.take_job)(kept_in(event["object"]))
        if key:
            wake(key)

    return registry
