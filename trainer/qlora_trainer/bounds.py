"""Bounds of time and memory for what this process does with files that somebody else wrote."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.liveness.cgroup import MemoryCgroup

RESERVE_BYTES = 512 << 20
"""Memory of the container that is kept free for everything else that grows meanwhile."""
LEAST_BYTES = 512 << 20
"""Given in any case: threads' stacks count before they are used."""


@dataclass(frozen=True)
class Bounds:
    """Limits of one call of a tokenizer, or of another piece of work; the system ends a process that takes more."""

    seconds: float = 300.0
    """Processor time of all threads. A batch of rows of a MiB takes seconds, the largest row a minute."""
    memory_bytes: int = 8 << 30
    """Beyond what the process has, and no more than its container has left. A tokenizer takes a hundred times the
    text's size; a row has 16 MiB at most."""


@contextmanager
def bounded(bounds: Bounds) -> Iterator[None]:
    """End this process, by SIGPROF or by the abort that a failed allocation is, if what is within takes more."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    most = _data_bytes() + _allowed_bytes(bounds.memory_bytes)
    soft = most if before[0] == resource.RLIM_INFINITY else min(most, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    signal.setitimer(signal.ITIMER_PROF, bounds.seconds)  # nothing handles its signal
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _allowed_bytes(most: int) -> int:
    """Return what a call may take, so that it fails before the kernel kills the process, which tells nothing."""
    cgroup = MemoryCgroup.of_this_process()
    available = cgroup.available_bytes() if cgroup else None
    return most if available is None else min(most, max(available - RESERVE_BYTES, LEAST_BYTES))


def _data_bytes() -> int:
    """Private memory of this process, as RLIMIT_DATA counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))
