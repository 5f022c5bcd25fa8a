"""Now and then, a look at what is really there.

Watches miss deletions: when the API server has forgotten where a watch was (410 Gone), kopf lists anew and tells what
there is, not what is gone. Metadata of all objects is cheap to list; what the store has beyond it is dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence

import aiohttp

from qlora_api.job import GROUP, VERSION
from qlora_operator.client import Api, ApiError
from qlora_operator.names import JOB_LABEL
from qlora_operator.reconcile import Reconciler
from qlora_operator.store import Key, Store

log = logging.getLogger(__name__)

RESYNC_SECONDS = 600
PAGE = 500
KINDS = {
    "job": (f"/apis/{GROUP}/{VERSION}", "qlorajobs", ""),
    "child": ("/apis/batch/v1", "jobs", JOB_LABEL),
    "pod": ("/api/v1", "pods", JOB_LABEL),
}


async def resync_forever(store: Store, api: Api, reconciler: Reconciler, namespaces: Sequence[str]) -> None:
    while True:
        await asyncio.sleep(RESYNC_SECONDS)
        try:
            for key in await resync(store, api, namespaces):
                reconciler.wake(key)
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            log.info("resync did not go through: %s", error)


async def resync(store: Store, api: Api, namespaces: Sequence[str]) -> list[Key]:
    """Drop what is not there any more; the keys that had something dropped."""
    before = set(_held(store))  # what comes while the lists are read is not judged by them
    there: set[str] = set()
    for base, plural, selector in KINDS.values():
        for namespace in namespaces or ("",):
            there |= await _uids(api, base, plural, selector, namespace)
    dropped: list[Key] = []
    for key, kind, uid in before:
        if uid not in there:
            dropped.append(key)
            store.drop(key, kind, uid)
    if dropped:
        log.info("%d objects were deleted unseen", len(dropped))
    return dropped


def _held(store: Store) -> Iterator[tuple[Key, str, str]]:
    for key, known in store:
        if known.job:
            yield key, "job", known.job.uid
        yield from ((key, "child", uid) for uid in known.children)
        yield from ((key, "pod", uid) for uid, pod in known.pods.items() if not pod.gone)


async def _uids(api: Api, base: str, plural: str, selector: str, namespace: str) -> set[str]:
    place = f"{base}/namespaces/{namespace}/{plural}" if namespace else f"{base}/{plural}"
    found: set[str] = set()
    token = ""
    while True:
        page = await api.get_metadata(place, limit=PAGE, labelSelector=selector, **{"continue": token})
        found |= {item["metadata"]["uid"] for item in page["items"]}
        token = page["metadata"].get("continue", "")
        if not token:
            return found
