"""Asking the first rank of each running attempt, and each Prepare, how far it is.

Whoever runs a pod decides on what it answers, and how slowly. Nothing but the pod's own address is connected to, and
what comes of an answer is one job's matter.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

import aiohttp

from qlora_api.contract import ProgressReport
from qlora_operator.kube.bounded_reads import TooLargeError, read_within
from qlora_operator.names import METRICS_PORT
from qlora_operator.state.cache import Key, ObjectCache
from qlora_operator.state.observed import PodSnapshot
from qlora_operator.state.reports import ReportError, read_report

log = logging.getLogger(__name__)

TIMEOUT = aiohttp.ClientTimeout(total=3)
AT_ONCE = 32
LARGEST_BYTES = 65536
LONGEST_PAUSE = 8
"""Rounds at most in which a pod that does not answer is left out, so that many of them do not delay the others."""
UNREADABLE = (aiohttp.ClientResponseError, ReportError, TooLargeError)
"""Errors that mean that a server answered, but not with a valid progress report."""


class ProgressPoller:
    """Asks all that train or prepare, again and again, and wakes those that have news.

    Args:
        cache: what is known.
        polled: the first pod of each job to ask. Jobs come and go while it is used.
        wake: told the key of each job that has news.
        every_seconds: between two rounds.
        rejected: told of each answer that is no progress report.
        now: the API server's time.
        port: of the pods.

    """

    def __init__(
        self,
        cache: ObjectCache,
        polled: Mapping[Key, PodSnapshot],
        wake: Callable[[Key], None],
        every_seconds: float,
        rejected: Callable[[], None],
        now: Callable[[], datetime],
        port: int = METRICS_PORT,
    ) -> None:
        self._cache, self._polled, self._wake = cache, polled, wake
        self._every, self._rejected, self._now, self._port = every_seconds, rejected, now, port
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._failures: Counter[str] = Counter()
        """Rounds in a row in which a pod, by UID, did not answer with a report."""
        self._round = 0

    async def run(self) -> None:
        """Ask until cancelled."""
        async with progress_session() as session:
            while True:
                await asyncio.sleep(self._every)
                await self._ask_all(session, dict(self._polled))

    async def _ask_all(self, session: aiohttp.ClientSession, pods: Mapping[Key, PodSnapshot]) -> None:
        self._round += 1
        there = {pod.uid for pod in pods.values()}
        self._failures = Counter({uid: count for uid, count in self._failures.items() if uid in there})
        due = {key: pod for key, pod in pods.items() if self._round % self._pause(pod) == 0}
        await asyncio.gather(*(self._ask(session, key, pod) for key, pod in due.items()))

    def _pause(self, pod: PodSnapshot) -> int:
        return min(LONGEST_PAUSE, 1 << min(self._failures[pod.uid], 8))

    async def _ask(self, session: aiohttp.ClientSession, key: Key, pod: PodSnapshot) -> None:
        try:
            async with self._slots:
                report = await self._ask_either(session, pod)
        except Exception as error:  # noqa: BLE001 one pod's answer is one job's matter, whatever it does to aiohttp
            if isinstance(error, UNREADABLE) or not isinstance(error, (aiohttp.ClientError, OSError)):
                self._rejected()
            self._failures[pod.uid] += 1
            log.debug("no progress of %s/%s from pod %s: %s", *key, pod.name, error)
            return
        self._failures.pop(pod.uid, None)
        self._take(key, pod, report)

    async def _ask_either(self, session: aiohttp.ClientSession, pod: PodSnapshot) -> ProgressReport:
        """Ask at the pod's address, and where that cannot be reached at the one of the other family."""
        try:
            return await ask_progress(session, pod.ip, self._port)
        except aiohttp.ClientConnectorError:
            if not pod.other_ip:
                raise
        return await ask_progress(session, pod.other_ip, self._port)

    def _take(self, key: Key, pod: PodSnapshot, report: ProgressReport) -> None:
        asked = self._polled.get(key)
        if asked is None or asked.uid != pod.uid or report.attempt != pod.attempt:
            return
        known = self._cache[key]
        before, known.report = known.report, report
        is_same = before is not None and (report.section, report.stage) == (before.section, before.stage)
        if not is_same:
            known.stage_start = self._now().replace(microsecond=0) - timedelta(seconds=round(report.stage_seconds))
        if not is_same or before is None or report.step != before.step:
            self._wake(key)


def progress_session() -> aiohttp.ClientSession:
    """Return a session that keeps nothing of an answer and unpacks nothing."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True, limit=AT_ONCE),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=TIMEOUT,
        trust_env=False,
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"},
    )


async def ask_progress(session: aiohttp.ClientSession, ip: str, port: int) -> ProgressReport:
    """Return the progress of a rank.

    Raises:
        ReportError, TooLargeError: it answers with something else.
        aiohttp.ClientError, OSError: it does not answer.

    """
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        raise ReportError("a pod's address is no IP address") from None
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        raise ReportError(f"{address} is no address of a pod")
    host = f"[{address}]" if address.version == 6 else str(address)
    async with session.get(f"http://{host}:{port}/progress", allow_redirects=False) as answer:
        if answer.status != 200:
            raise ReportError(f"status code {answer.status}")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise ReportError("an encoded answer")
        return read_report(await read_within(answer.content, LARGEST_BYTES))
