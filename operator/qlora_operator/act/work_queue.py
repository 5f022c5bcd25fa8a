"""A queue of keys: each is handled by one worker at a time, and again, later and later, when that fails.

Any number of changes of one key are one piece of work. A key that is added while it is handled is handled once more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, Protocol, TypeVar

from qlora_operator.supervisor import backoff

WORKERS = 8
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 60.0
SHORTEST_DELAY_SECONDS = 0.01

K = TypeVar("K", bound=Hashable)


class QueueMetrics(Protocol):
    """Receives the times that keys wait and are handled."""

    def waited(self, seconds: float) -> None: ...

    def reconciled(self, seconds: float) -> None: ...


class WorkQueue(Generic[K]):
    """Keys to handle, with timers and back-off.

    Args:
        metrics: told how long each key waited, and how long it was handled.
        retry_after: the seconds for which an error asks not to be tried again, whatever happens meanwhile; 0: none.
        failed: told of each error, and after how many seconds its key is handled again.

    """

    def __init__(
        self,
        metrics: QueueMetrics,
        retry_after: Callable[[Exception], float],
        failed: Callable[[K, Exception, float], None],
    ) -> None:
        self._metrics, self._retry_after, self._failed = metrics, retry_after, failed
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._added: dict[K, float] = {}
        """Time at which each key that waits for a worker was added."""
        self._active: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._not_before: dict[K, float] = {}

    def add(self, key: K) -> None:
        """Handle a key as soon as possible, but not before the time that its last error asked for."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        left = self._not_before.get(key, 0.0) - time.monotonic()
        if left > 0:
            self.add_after(key, left)
            return
        self._not_before.pop(key, None)
        if key not in self._added:
            self._added[key] = time.monotonic()
            if key not in self._active:
                self._ready.put_nowait(key)

    def add_after(self, key: K, seconds: float) -> None:
        """Handle a key after a while; the earliest of several times counts."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer and timer.when() <= loop.time() + seconds:
            return
        if timer:
            timer.cancel()
        self._timers[key] = loop.call_later(max(seconds, SHORTEST_DELAY_SECONDS), self.add, key)

    def failures(self, key: K) -> int:
        """Return how often in a row a key has failed."""
        return self._failures.get(key, 0)

    async def run(self, handle: Callable[[K], Awaitable[None]]) -> None:
        """Handle keys until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._work(handle))

    async def _work(self, handle: Callable[[K], Awaitable[None]]) -> None:
        while True:
            key = await self._ready.get()
            self._metrics.waited(time.monotonic() - self._added.pop(key))
            self._active.add(key)
            started = time.monotonic()
            try:
                await handle(key)
                self._failures.pop(key, None)
            except Exception as error:  # noqa: BLE001 one key's error must not stop the others
                self._retry(key, error)
            except asyncio.CancelledError:
                self._added.setdefault(key, started)  # the next call of run takes it up again
                raise
            finally:
                self._metrics.reconciled(time.monotonic() - started)
                self._active.discard(key)
                if key in self._added:
                    self._ready.put_nowait(key)

    def _retry(self, key: K, error: Exception) -> None:
        failures = self._failures[key] = self.failures(key) + 1
        wait = backoff(failures, FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)
        if asked := self._retry_after(error):
            wait = max(wait, asked)
            self._not_before[key] = time.monotonic() + asked
        self._failed(key, error, wait)
        self.add_after(key, wait)
