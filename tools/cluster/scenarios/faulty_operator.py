"""``python faulty_operator.py FAILURES --config FILE``: an operator each of whose tasks fails so often before it works.

A task fails in the middle of what it does, in turn: at once, and after a moment of work.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_operator.app import Operator, main

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlora_operator.supervisor import BackgroundTask

WORKS_SECONDS = 0.3


class InjectedError(Exception):
    """Nothing that the operator expects."""


def faulty(task: BackgroundTask, failures: int) -> BackgroundTask:
    """Return the task, which fails so often first."""
    left = failures

    async def run() -> None:
        nonlocal left
        works = asyncio.ensure_future(task.run())
        try:
            if left > 0:
                left -= 1
                await asyncio.sleep(WORKS_SECONDS if left % 2 else 0)
                raise InjectedError(task.name)
            await works
        finally:
            works.cancel()
            await asyncio.wait([works], timeout=5)

    return replace(task, run=run)


if __name__ == "__main__":
    times = int(sys.argv.pop(1))
    honest = Operator.background_tasks

    def background_tasks(operator: Operator) -> Iterator[BackgroundTask]:
        return (faulty(task, times) for task in honest(operator))

    Operator.background_tasks = background_tasks  # type: ignore[method-assign]
    main()
