"""The processes of one worker's ranks: start them, wait for them, and end them when one fails.

Ranks are numbered by their place; there is nothing to negotiate, so torchrun's agent, which listens on the network
and unpickles what it finds in its store, is not used (docs/decisions/0005).
"""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from types import FrameType

POLL_SECONDS = 0.2
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""End the ranks at once. SIGTERM is passed on to them, and they decide (:mod:`qlora_trainer.worker.stop`)."""


class InterruptedBySignalError(Exception):
    """One of ``SIGNALS`` came while the ranks ran; they have been ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def run_ranks(
    command: Sequence[str], environments: Mapping[int, Mapping[str, str]], grace_seconds: float
) -> dict[int, int]:
    """Run one process for each rank to its end.

    Args:
        command: of each process.
        environments: by rank, the whole environment of its process.
        grace_seconds: how long the others may take to end after SIGTERM when one has failed.

    Returns:
        Exit codes of those that failed first, negative for a signal; empty where all ended well.

    Raises:
        InterruptedBySignalError: see ``SIGNALS``.

    """
    processes: dict[int, subprocess.Popen[bytes]] = {}
    with _raising_on_signals():
        try:
            for rank, environment in environments.items():
                processes[rank] = subprocess.Popen(command, env=environment)
            while True:
                codes = {rank: process.poll() for rank, process in processes.items()}
                failed = {rank: code for rank, code in codes.items() if code}
                if failed or all(code == 0 for code in codes.values()):
                    return failed
                time.sleep(POLL_SECONDS)
        finally:
            _end(processes.values(), grace_seconds)


def _end(processes: Collection[subprocess.Popen[bytes]], grace_seconds: float) -> None:
    """Tell the processes that still run to stop, and kill those that do not."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    until = time.monotonic() + grace_seconds
    for process in running:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _raising_on_signals() -> Iterator[None]:
    """Turn the first of ``SIGNALS`` into an exception; ignored ones stay ignored, and more of them are."""
    caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for other in caught:
            signal.signal(other, signal.SIG_IGN)
        raise InterruptedBySignalError(number)

    before = {number: signal.signal(number, interrupt) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
