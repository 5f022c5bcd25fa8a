"""Read what the kernel's out-of-memory killer did from the counters of this process's cgroup, version 1 or 2.

A SIGKILL says nothing about who sent it; the counter does. Kernel documentation: admin-guide/cgroup-v1/memory.rst
(``memory.oom_control``), admin-guide/cgroup-v2.rst (``memory.events``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 60
"""Version 1 has a huge number where there is no limit."""


@dataclass(frozen=True)
class MemoryCgroup:
    """The cgroup that accounts for this process's memory."""

    events: Path
    """Has a line ``oom_kill N``."""
    limit: Path
    peak: Path
    usage: Path
    statistics: Path
    """Has a line for each kind of memory."""
    cached: tuple[str, ...]
    """Kinds that the kernel frees before it kills: pages of files."""

    @classmethod
    def of_this_process(cls, proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup")) -> MemoryCgroup | None:
        """Find it; None where there is none. In a container its own cgroup may be mounted as the root."""
        try:
            lines = (proc / "self" / "cgroup").read_text().splitlines()
        except OSError:
            return None
        found = (c for line in lines for c in cls._candidates(line, mount) if c.events.is_file())
        return next(found, None)

    @classmethod
    def _candidates(cls, line: str, mount: Path) -> Iterator[MemoryCgroup]:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in (mount / path.lstrip("/"), mount):
                yield cls(
                    folder / "memory.events",
                    folder / "memory.max",
                    folder / "memory.peak",
                    *_usage(folder, "memory.current", ""),
                )
        elif "memory" in controllers.split(","):
            for folder in (mount / "memory" / path.lstrip("/"), mount / "memory"):
                yield cls(
                    folder / "memory.oom_control",
                    folder / "memory.limit_in_bytes",
                    folder / "memory.max_usage_in_bytes",
                    *_usage(folder, "memory.usage_in_bytes", "total_"),
                )

    def oom_kills(self) -> int:
        """Processes of the cgroup that the out-of-memory killer has killed so far."""
        for line in self.events.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
        return 0

    def limit_bytes(self) -> int | None:
        """None where there is none."""
        size = _number(self.limit)
        return size if size is not None and size < UNLIMITED else None

    def available_bytes(self) -> int | None:
        """Return what can be taken before the kernel kills a process; None where no limit is told."""
        limit, used = self.limit_bytes(), _number(self.usage)
        if limit is None or used is None or not self.statistics.is_file():
            return None
        lines = (line.split() for line in self.statistics.read_text().splitlines())
        return limit - used + sum(int(count) for name, count in lines if name in self.cached)

    def peak_bytes(self) -> int | None:
        """Return the most that was ever used; None where this kernel does not tell."""
        return _number(self.peak)


def _usage(folder: Path, usage: str, prefix: str) -> tuple[Path, Path, tuple[str, ...]]:
    return folder / usage, folder / "memory.stat", (f"{prefix}inactive_file", f"{prefix}active_file")


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


class OomWatch:
    """Tells whether the kernel has killed for memory since this was made."""

    def __init__(self, cgroup: MemoryCgroup | None) -> None:
        self._cgroup = cgroup
        self._before = cgroup.oom_kills() if cgroup else 0

    def oom_killed(self) -> bool:
        return self._cgroup is not None and self._cgroup.oom_kills() > self._before

    def describe(self) -> str:
        """Describe the memory limit and the peak, for a message."""
        limit = self._cgroup.limit_bytes() if self._cgroup else None
        peak = self._cgroup.peak_bytes() if self._cgroup else None
        if limit is None:
            return "the machine had none left"
        used = f", the most that was used {peak / 2**30:.2f} GiB" if peak is not None else ""
        return f"the limit of all processes together is {limit / 2**30:.2f} GiB{used}"
