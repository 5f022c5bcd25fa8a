"""Real memory limits: a cgroup of a test's own, version 1 or 2."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class Limit:
    """A cgroup with a memory limit; ``enter`` is called in a process that is about to become another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))


@contextmanager
def memory_limit(size: int):
    """Make the cgroup, and remove it with all that is left in it.

    Raises:
        OSError: this machine does not let us.

    """
    version_1 = (ROOT / "memory").is_dir()
    folder = (ROOT / "memory" if version_1 else ROOT) / f"qlora-test-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(size))
        yield Limit(folder)
    finally:
        for pid in (folder / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        deadline = time.monotonic() + 20
        while True:
            try:
                folder.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
