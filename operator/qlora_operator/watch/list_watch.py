"""List and watch of what belongs to QLoRAJobs: everything there is, then each change as it comes.

kopf watches the QLoRAJobs themselves. Of the rest there is ten times as much, and to kopf each object is a record that
stays and each change a task: more than half of the operator's CPU time and memory (docs/scale.md). Here a change is one
function call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from qlora_api.job import GROUP, VERSION
from qlora_operator.kube.client import TRANSIENT, WATCH_SECONDS, Api, ApiError, Object
from qlora_operator.names import FIELD_MANAGER, JOB_LABEL, MANAGED_BY_LABEL, SERVICE
from qlora_operator.state.cache import Key, ObjectCache
from qlora_operator.state.observed import NotOwnedError
from qlora_operator.state.skip_reasons import NOT_OWNED, UNREADABLE
from qlora_operator.state.sweep_cache import SweepCache
from qlora_operator.supervisor import backoff

log = logging.getLogger(__name__)

BREATH_SECONDS = 0.1
"""Between two watches, so that an API server that ends them at once is not asked without end."""
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 30.0
GONE = 410
Take = Callable[[Object], Key | None]


@dataclass(frozen=True)
class WatchedKind:
    """Kind of object to watch, with its receivers. ``take`` and ``drop`` return the key to wake; None: no news."""

    base: str
    plural: str
    selectors: Mapping[str, str]
    take: Take
    drop: Take
    held: Callable[[], Iterable[tuple[Key, str]]] = tuple
    """Keys and identities of what is known. What of it is not listed any more is dropped by ``lose``."""
    lose: Callable[[Key, str], None] = lambda _key, _identity: None
    identity: Literal["uid", "namespace"] = "uid"


def kinds_of(cache: ObjectCache, services: set[str]) -> tuple[WatchedKind, ...]:
    """Return the kinds that belong to QLoRAJobs, owners first: what is listed later belongs to what is before."""
    ours = {"labelSelector": JOB_LABEL}
    # The Job controller says why it cannot make pods in Events, and nowhere else.
    refusals = {"fieldSelector": "reason=FailedCreate,involvedObject.kind=Job"}
    shared = {"labelSelector": f"{MANAGED_BY_LABEL}={FIELD_MANAGER}", "fieldSelector": f"metadata.name={SERVICE}"}

    def lose(kind: str) -> Callable[[Key, str], None]:
        return lambda key, uid: cache.drop(key, kind, uid)

    def held_services() -> list[tuple[Key, str]]:
        return [((namespace, ""), namespace) for namespace in services]

    def lose_service(_: Key, namespace: str) -> None:
        services.discard(namespace)

    def unshared(body: Object) -> None:
        services.discard(body["metadata"]["namespace"])

    return (
        WatchedKind(
            "/apis/batch/v1", "jobs", ours, cache.take_child, cache.drop_child, cache.held_children, lose("child")
        ),
        WatchedKind("/api/v1", "pods", ours, cache.take_pod, cache.drop_pod, cache.held_pods, lose("pod")),
        WatchedKind("/api/v1", "events", refusals, cache.take_refusal, lambda _: None),
        # The reconciler knows what it makes. A late word of it here could be of one that is gone again.
        WatchedKind("/api/v1", "services", shared, lambda _: None, unshared, held_services, lose_service, "namespace"),
    )


def sweeps_kind(sweeps: SweepCache) -> WatchedKind:
    """Return the kind of QLoRASweeps."""
    return WatchedKind(
        f"/apis/{GROUP}/{VERSION}", "qlorasweeps", {}, sweeps.take, sweeps.drop, sweeps.held, sweeps.lose
    )


class Watch:
    """One kind in one namespace, or in all.

    Args:
        api: the operator's calls.
        kind: what is watched.
        namespace: empty: all.
        wake: told the key of what changed.
        note: told the path of each watch as it begins.
        skipped: told plural and reason of each object that is left out.

    """

    def __init__(
        self,
        api: Api,
        kind: WatchedKind,
        namespace: str,
        wake: Callable[[Key], None],
        note: Callable[[str], None],
        skipped: Callable[[str, str], None],
    ) -> None:
        self._api, self._kind, self._namespace, self._wake, self._note = api, kind, namespace, wake, note
        self._skipped = skipped
        where = f"/namespaces/{namespace}" if namespace else ""
        self.path = f"{kind.base}{where}/{kind.plural}"
        self._version = ""
        """Newest resourceVersion; empty if nothing was listed yet, or if it has expired."""

    @property
    def plural(self) -> str:
        """Return the plural name of the watched kind."""
        return self._kind.plural

    async def list(self) -> set[Key]:
        """Take in everything there is, and drop what is gone; the keys that have news.

        Raises:
            ApiError, aiohttp.ClientError, TimeoutError: it is not all there yet.

        """
        before = {held for held in self._kind.held() if self._namespace in ("", held[0][0])}
        there: set[str] = set()
        news: set[Key | None] = set()
        version = ""
        async for page in self._api.pages(self.path, self._kind.selectors):
            version = page["metadata"]["resourceVersion"]
            for item in page["items"] or ():
                there.add(item["metadata"][self._kind.identity])
                news.add(self._tell(self._kind.take, item))
        for key, identity in before:
            if identity not in there:
                self._kind.lose(key, identity)
                news.add(key)
        self._version = version
        return {key for key in news if key}

    async def run(self, listed: asyncio.Event) -> None:
        """Watch until cancelled, once everything was listed."""
        await listed.wait()
        try:
            await self._run()
        except Exception:
            self._version = ""  # what was being taken in when it ended is listed anew
            raise

    async def _run(self) -> None:
        failures = 0
        while True:
            wait = BREATH_SECONDS
            try:
                if not self._version:
                    for key in await self.list():
                        self._wake(key)
                await self._follow()
                failures = 0
            except ApiError as error:
                self._version = ""
                if error.status != GONE:
                    failures += 1
                    wait = max(backoff(failures, FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS), error.retry_after or 0)
                    log.warning("watch of %s: %s; again in %.1f s", self._kind.plural, error, wait)
            except TRANSIENT as error:
                failures += 1
                wait = backoff(failures, FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)
                log.info("watch of %s: no answer (%s); again in %.1f s", self._kind.plural, type(error).__name__, wait)
            await asyncio.sleep(wait)

    async def _follow(self) -> None:
        """Take in changes until the API server ends the watch."""
        self._note(f"{self.path}?watch=true")
        parameters: dict[str, str | int] = {
            **self._kind.selectors,
            "resourceVersion": self._version,
            "timeoutSeconds": WATCH_SECONDS,
        }
        async for change in self._api.watch(self.path, **parameters):
            if change is None:
                self._skipped(self._kind.plural, UNREADABLE)
                continue
            body = change["object"]
            if change["type"] != "BOOKMARK":
                key = self._tell(self._kind.drop if change["type"] == "DELETED" else self._kind.take, body)
                if key:
                    self._wake(key)
            self._version = body["metadata"]["resourceVersion"]

    def _tell(self, told: Take, body: Object) -> Key | None:
        """Have an object taken in or dropped; one that is not the operator's, or cannot be read, is left out."""
        try:
            return told(body)
        except NotOwnedError as error:
            log.debug("%s", error)
            self._skipped(self._kind.plural, NOT_OWNED)
        except Exception as error:  # noqa: BLE001 one object must not end the watch of all
            meta = body.get("metadata") or {}
            log.warning("%s %s/%s is skipped: %r", self._kind.plural, meta.get("namespace"), meta.get("name"), error)
            self._skipped(self._kind.plural, UNREADABLE)
        return None
