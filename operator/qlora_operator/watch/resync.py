"""Looks at what is really there: before the first decision, after each new listing of kopf's, and now and then.

kopf's watch misses deletions: when the API server has forgotten where a watch was (410 Gone), kopf lists anew and tells
what there is, not what is gone. Metadata of all objects is cheap to list; what the cache has beyond it is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from qlora_api.job import GROUP, VERSION
from qlora_operator.kube.client import TRANSIENT, Api, ApiError, Object
from qlora_operator.manifests.render import service
from qlora_operator.names import FIELD_MANAGER, JOB_LABEL, MANAGED_BY_LABEL, SERVICE
from qlora_operator.state.cache import Key, ObjectCache
from qlora_operator.state.ownership import is_same_object
from qlora_operator.state.skip_reasons import UNREADABLE

log = logging.getLogger(__name__)

RESYNC_SECONDS = 600
SETTLE_SECONDS = 0.5
"""After a new listing. The watches of all kinds break together, when the API server goes."""
RETRY_SECONDS = 5
KINDS = {
    "job": (f"/apis/{GROUP}/{VERSION}", "qlorajobs", ""),
    "child": ("/apis/batch/v1", "jobs", JOB_LABEL),
    "pod": ("/api/v1", "pods", JOB_LABEL),
}
"""In this order: what is listed later belongs to what is listed before."""


class Listings:
    """Notices, from the paths of kopf's requests, that a watch begins after a listing."""

    def __init__(self) -> None:
        self._listed: set[str] = set()
        self.news = asyncio.Event()
        """Something may have been deleted unseen."""

    def note(self, path: str) -> None:
        place, _, query = path.partition("?")
        if "watch=true" not in query:
            if re.search(r"/(qlorajobs|jobs|pods)$", place):
                self._listed.add(place)
        elif place in self._listed:
            self._listed.discard(place)
            self.news.set()


async def list_jobs(
    cache: ObjectCache, api: Api, namespaces: Sequence[str], skipped: Callable[[str, str], None]
) -> set[str]:
    """Fill the cache with all QLoRAJobs; the namespaces that have the shared Service.

    Raises:
        ApiError, aiohttp.ClientError, TimeoutError: it is not all there yet.

    """
    async for item in _items(api, *KINDS["job"][:2], namespaces, ""):
        try:
            cache.take_job(item)
        except (KeyError, TypeError, ValueError) as error:
            log.warning("a QLoRAJob is skipped: %r", error)
            skipped(KINDS["job"][1], UNREADABLE)
    managed = f"{MANAGED_BY_LABEL}={FIELD_MANAGER}"
    found: set[str] = set()
    async for item in _items(api, "/api/v1", "services", namespaces, managed):
        namespace = item["metadata"]["namespace"]
        if item["metadata"]["name"] == SERVICE and is_same_object(service(namespace), item):
            found.add(namespace)
    return found


async def resync_forever(
    cache: ObjectCache, api: Api, wake: Callable[[Key], None], namespaces: Sequence[str], listings: Listings
) -> None:
    settle = 0.0  # the first listing follows the first look, and no watch that broke
    while True:
        kinds = tuple(KINDS)
        with suppress(TimeoutError):
            await asyncio.wait_for(listings.news.wait(), RESYNC_SECONDS)
            await asyncio.sleep(settle)
            settle = SETTLE_SECONDS
            kinds = ("job",)  # of the others kopf knows nothing
        listings.news.clear()
        try:
            for key in await resync(cache, api, namespaces, kinds):
                wake(key)
        except (ApiError, *TRANSIENT) as error:
            log.info("resync failed: %s", error)
            await asyncio.sleep(RETRY_SECONDS)
            listings.news.set()


async def resync(cache: ObjectCache, api: Api, namespaces: Sequence[str], kinds: Iterable[str] = KINDS) -> list[Key]:
    """Drop what is not there any more of some kinds; the keys that had something dropped."""
    before = {held for held in _held(cache) if held[1] in kinds}  # what comes meanwhile is not judged by the lists
    there: set[str] = set()
    for base, plural, selector in (KINDS[kind] for kind in kinds):
        items = _items(api, base, plural, namespaces, selector, metadata_only=True)
        there |= {item["metadata"]["uid"] async for item in items}
    dropped: list[Key] = []
    for key, kind, uid in before:
        if uid not in there:
            dropped.append(key)
            cache.drop(key, kind, uid)
    if dropped:
        log.info("the deletion of %d objects was missed", len(dropped))
    return dropped


def _held(cache: ObjectCache) -> Iterator[tuple[Key, str, str]]:
    for key, known in cache:
        if known.job:
            yield key, "job", known.job.uid
        yield from ((key, "child", uid) for uid in known.children)
        yield from ((key, "pod", uid) for uid, pod in known.pods.items() if not pod.gone)


async def _items(
    api: Api, base: str, plural: str, namespaces: Sequence[str], selector: str, *, metadata_only: bool = False
) -> AsyncIterator[Object]:
    """Yield all objects of a kind, page by page, each with its kind as if it had been asked for alone."""
    for namespace in namespaces or ("",):
        place = f"{base}/namespaces/{namespace}/{plural}" if namespace else f"{base}/{plural}"
        async for page in api.pages(place, {"labelSelector": selector}, metadata_only=metadata_only):
            for item in page["items"] or ():  # an empty list of metadata has null there
                yield {"apiVersion": page["apiVersion"], "kind": page["kind"].removesuffix("List"), **item}
