"""Asking the first rank of each running attempt how far it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import aiohttp
from pydantic import ValidationError

from qlora_api.contract import ProgressReport
from qlora_operator.names import METRICS_PORT
from qlora_operator.reconcile import Reconciler
from qlora_operator.seen import SeenPod
from qlora_operator.store import Key, Store

log = logging.getLogger(__name__)

TIMEOUT = aiohttp.ClientTimeout(total=3)
AT_ONCE = 32
LARGEST_BYTES = 65536


async def poll_forever(store: Store, reconciler: Reconciler, every_seconds: float) -> None:
    """Ask all that train, again and again, and wake those that have news."""
    slots = asyncio.Semaphore(AT_ONCE)
    async with aiohttp.ClientSession(timeout=TIMEOUT, trust_env=False) as session:
        while True:
            await asyncio.sleep(every_seconds)
            await _poll_once(session, slots, store, reconciler, dict(reconciler.polled))


async def _poll_once(
    session: aiohttp.ClientSession,
    slots: asyncio.Semaphore,
    store: Store,
    reconciler: Reconciler,
    pods: Mapping[Key, SeenPod],
) -> None:
    async def ask(key: Key, pod: SeenPod) -> None:
        async with slots:
            report = await ask_progress(session, pod.ip)
        known = store[key]
        if report and report.attempt == pod.attempt and key in reconciler.polled:
            news = known.report is None or report.step != known.report.step or report.section != known.report.section
            known.report = report
            if news:
                reconciler.wake(key)

    await asyncio.gather(*(ask(key, pod) for key, pod in pods.items()))


async def ask_progress(session: aiohttp.ClientSession, ip: str) -> ProgressReport | None:
    """The progress of a rank; None where it does not answer, or with something else."""
    host = f"[{ip}]" if ":" in ip else ip
    try:
        async with session.get(f"http://{host}:{METRICS_PORT}/progress") as answer:
            if answer.status != 200:
                return None
            return ProgressReport.model_validate_json(await answer.content.read(LARGEST_BYTES))
    except (aiohttp.ClientError, TimeoutError, OSError, ValidationError) as error:
        log.debug("no progress from %s: %s", ip, error)
        return None
