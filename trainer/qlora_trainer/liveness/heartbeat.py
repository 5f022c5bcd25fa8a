"""Signs of life of the ranks of one pod, in memory that they share with the process that started them.

A rank writes what it does and since when, some thirty bytes, whenever it comes into a section or gets on within one. No
network, no locks, no calls into the kernel: a rank that hangs in a collective, or is stopped, cannot be asked.
:mod:`qlora_trainer.liveness.watchdog` reads. Light to import: both sides use it.
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


_STEP = frozenset({Section.DATA, Section.FORWARD, Section.BACKWARD, Section.COLLECTIVE, Section.OPTIMIZER})


def phase(section: Section, steps_done: int) -> str:
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
    """Of a collective: what the rank did when it came to it. Else the section itself."""
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
    """Written by one rank.

    Args:
        path: made by :func:`prepare_files`; None where nobody watches.

    """

    def __init__(self, path: Path | None = None) -> None:
        self.section = Section.LOAD
        self.step = 0
        self.wall = time.time()
        """When the last sign was given, in seconds since 1970."""
        self.spent = dict.fromkeys(Section, 0.0)
        """Seconds in each section up to the last sign."""
        self._around = Section.LOAD
        self._at = time.monotonic()
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

    def beat(self) -> None:
        """Give a sign: the rank gets on."""
        now = time.monotonic()
        self.spent[self.section] += now - self._at
        self._at, self.wall = now, time.time()
        self._page[:] = Beat(now, self.section, self._around, os.getpid(), self.step).to_bytes(self.wall)

    @contextmanager
    def during(self, section: Section) -> Iterator[None]:
        """Be in a section; afterwards in the one before."""
        before = self.section, self._around
        self.enter(section, self._around if section is Section.COLLECTIVE else section)
        yield
        self.enter(*before)  # not after an exception: where it happened is worth knowing

    def done(self) -> None:
        """Nothing more is to be expected."""
        self.enter(Section.DONE, Section.DONE)

    def enter(self, section: Section, around: Section) -> None:
        """Be in a section from now on."""
        self.spent[self.section] += time.monotonic() - self._at
        self._at = time.monotonic()
        self.section, self._around = section, around
        self.beat()


def node_name() -> str:
    """The node as the cluster calls it, else this machine's name."""
    return os.environ.get("NODE_NAME") or platform.node()


def file_of(folder: Path, local_rank: int) -> Path:
    return folder / f"rank-{local_rank}"


def prepare_files(folder: Path, ranks: int) -> None:
    """Make the ranks' files, as if each had just begun: one that never gets so far is missed like any other."""
    for local_rank in range(ranks):
        beat = Beat(time.monotonic(), Section.LOAD, Section.LOAD, 0, 0)
        file_of(folder, local_rank).write_bytes(beat.to_bytes(time.time()))


def read_all(folder: Path) -> list[Beat]:
    """The last sign of each of the pod's ranks, by local rank."""
    return [Beat.read(path) for path in sorted(folder.glob("rank-*"), key=lambda p: int(p.name.removeprefix("rank-")))]
