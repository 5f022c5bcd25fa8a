"""Run the operator's background tasks and restart each that fails, independently of the others.

A task that ends is logged, counted and restarted with exponential backoff. One that keeps failing shows in
``qlora_operator_task_failures_total`` and, if it is a watch, in ``/healthz``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 30.0
STEADY_SECONDS = 120
"""A task that ran for so long is started again as if it had never failed."""


@dataclass(frozen=True)
class BackgroundTask:
    """One concurrent task."""

    name: str
    """Label of the metric: from a closed list."""
    run: Callable[[], Awaitable[None]]
    """Runs until cancelled, and can be called again after it has raised."""


def backoff(failures: int, first: float, longest: float) -> float:
    """Return the seconds to wait after so many failures in a row, from 1 on: twice as long each time, up to a limit."""
    return min(first * 2.0 ** min(failures - 1, 32), longest)  # a float has no 2 ** 1024


async def supervise(task: BackgroundTask, failed: Callable[[str], None]) -> None:
    """Run a task until cancelled; tell ``failed`` its name each time it ends by itself."""
    failures = 0
    while True:
        started = time.monotonic()
        error = await _ended(task)
        failed(task.name)
        failures = 0 if time.monotonic() - started > STEADY_SECONDS else failures + 1
        wait = backoff(failures, FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)
        log.error("task %s ended; it is restarted in %.1f s", task.name, wait, exc_info=error)
        await asyncio.sleep(wait)


async def _ended(task: BackgroundTask) -> BaseException | None:
    """Run a task until it ends by itself; what it raised."""
    try:
        await task.run()
    except asyncio.CancelledError as error:
        current = asyncio.current_task()
        if current and current.cancelling():
            raise
        return error  # of something that the task waited for
    except Exception as error:  # noqa: BLE001 whatever it is
        return error
    return None
