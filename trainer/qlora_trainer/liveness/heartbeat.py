"""Signs of life of the ranks of one pod, in memory that they share with the process that started them.

A rank writes what it does and since when, some thirty bytes, whenever it comes into a section or gets on within one. No
network, no lock between processes, no calls into the kernel: a rank that hangs in a collective, or is stopped, cannot
be asked. :mod:`qlora_trainer.liveness.watchdog` reads. Light to import: both sides use it.
"""

from __future__ import annotations

import mmap
import os
import platform
import struct
import time
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum, auto
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ENVIRONMENT = "QLORA_HEARTBEATS"
"""Names the folder of the pod's files; the launcher sets it."""


class Section(IntEnum):
    """Section of a rank's work."""

    LOAD = auto()
    """From its start: imports, meeting the others, the model, the checkpoint."""
    DATA = auto()
    """Waits for its next batch."""
    FORWARD = auto()
    BACKWARD = auto()
    COLLECTIVE = auto()
    """Waits for other ranks; on a GPU also for its own kernels."""
    OPTIMIZER = auto()
    EVALUATE = auto()
    CHECKPOINT = auto()
    PUBLISH = auto()
    DONE = auto()
    """Nothing more is expected of it."""

    @property
    def title(self) -> str:
        return self.name.capitalize()

    @property
    def phase(self) -> str:
        """Name for people and dashboards: what a step does after it has its rows is one, ``Train``."""
        return "Train" if self in _TRAIN else self.title


_TRAIN = frozenset({Section.FORWARD, Section.BACKWARD, Section.COLLECTIVE, Section.OPTIMIZER})
_STEP = _TRAIN | {Section.DATA}


def activity(section: Section, steps_done: int) -> str:
    """Return a rank's activity in words: ``Backward of step 7``."""
    return f"{section.title} of step {steps_done + 1}" if section in _STEP else section.title


_FORMAT = struct.Struct("=ddiiii")
"""Monotonic time of the last sign, wall-clock time of it, section, section around it, process id, step."""


@dataclass(frozen=True)
class Beat:
    """The last sign of life of one rank."""

    at: float
    """``time.monotonic()``, which the processes of one machine share."""
    section: Section
    around: Section
    """For a collective, the section that the rank was in when it began; otherwise the section itself."""
    pid: int
    """0 before the rank's process has begun."""
    step: int
    """Optimizer steps done."""

    def to_bytes(self, wall: float) -> bytes:
        return _FORMAT.pack(self.at, wall, self.section, self.around, self.pid, self.step)

    @classmethod
    def read(cls, path: Path) -> Beat:
        at, _, section, around, pid, step = _FORMAT.unpack(path.read_bytes())
        return cls(at, Section(section), Section(around), pid, step)


class Heartbeat:
    """Tell what one rank does, and count its time by it. The one clock of a rank's sections.

    Written by the rank's own thread; others read.

    Args:
        path: made by :func:`prepare_files`; None where nobody watches.

    """

    def __init__(self, path: Path | None = None) -> None:
        self.step = 0
        self.wall = time.time()
        """Time of the last heartbeat, in seconds since 1970."""
        self.section = self._around = Section.LOAD
        self._since = self._phase_since = time.monotonic()
        self._spent: dict[tuple[Section, Section], float] = {}
        """Seconds by section and the section around it, before this one."""
        self._lock = Lock()
        """Guards the clock, so that no reader sees the time of a section decrease."""
        self._page: mmap.mmap | bytearray = bytearray(_FORMAT.size)
        if path is not None:
            with path.open("r+b") as file:
                self._page = mmap.mmap(file.fileno(), _FORMAT.size)
        self.beat()

    @classmethod
    def of_this_rank(cls) -> Heartbeat:
        """For the rank whose process this is, as the launcher's environment says."""
        folder = os.environ.get(ENVIRONMENT)
        return cls(file_of(Path(folder), int(os.environ["LOCAL_RANK"])) if folder else None)

    @property
    def phase(self) -> str:
        """Return what the rank does now, for people: waiting for other ranks belongs to what it is done for."""
        return self._around.phase

    @property
    def seconds_in_phase(self) -> float:
        """Return for how long the rank has been in its phase."""
        return time.monotonic() - self._phase_since

    def section_seconds(self) -> dict[Section, float]:
        """Return the time in each section up to now."""
        seconds = dict.fromkeys(Section, 0.0)
        for (section, _), spent in self._seconds().items():
            seconds[section] += spent
        return seconds

    def phase_seconds(self) -> dict[str, float]:
        """Return the time in each phase that the rank has come to, up to now."""
        seconds: dict[str, float] = {}
        for (_, around), spent in self._seconds().items():
            seconds[around.phase] = seconds.get(around.phase, 0.0) + spent
        return seconds

    def beat(self) -> None:
        """Give a sign: the rank gets on."""
        self.wall = time.time()
        last = Beat(time.monotonic(), self.section, self._around, os.getpid(), self.step)
        self._page[:] = last.to_bytes(self.wall)

    @contextmanager
    def during(self, section: Section) -> Iterator[None]:
        """Be in a section; afterwards in the one before."""
        before = self.section, self._around
        self.enter(section, self._around if section is Section.COLLECTIVE else section)
        yield
        self.enter(*before)  # not after an exception: where it happened is worth knowing

    def done(self) -> None:
        """Nothing more is to be expected."""
        self.enter(Section.DONE)

    def enter(self, section: Section, around: Section | None = None) -> None:
        """Be in a section from now on; ``around`` is what a collective is waited for in, else the section itself."""
        with self._lock:
            now, here = time.monotonic(), (self.section, self._around)
            self._spent[here] = self._spent.get(here, 0.0) + now - self._since
            if (around or section).phase != self._around.phase:
                self._phase_since = now
            self.section, self._around, self._since = section, around or section, now
        self.beat()

    def _seconds(self) -> dict[tuple[Section, Section], float]:
        with self._lock:
            spent, here = dict(self._spent), (self.section, self._around)
            spent[here] = spent.get(here, 0.0) + time.monotonic() - self._since
        return spent


def node_name() -> str:
    """Return the node as the cluster calls it, else this machine's name."""
    return os.environ.get("NODE_NAME") or platform.node()


def file_of(folder: Path, local_rank: int) -> Path:
    return folder / f"rank-{local_rank}"


def prepare_files(folder: Path, ranks: int) -> None:
    """Make the ranks' files, as if each had just begun: one that never gets so far is missed like any other."""
    for local_rank in range(ranks):
        beat = Beat(time.monotonic(), Section.LOAD, Section.LOAD, 0, 0)
        file_of(folder, local_rank).write_bytes(beat.to_bytes(time.time()))


def read_all(folder: Path) -> list[Beat]:
    """Return the last sign of each of the pod's ranks, by local rank."""
    return [Beat.read(path) for path in sorted(folder.glob("rank-*"), key=lambda p: int(p.name.removeprefix("rank-")))]
