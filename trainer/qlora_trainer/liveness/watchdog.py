"""Find the rank that makes no progress, from heartbeats alone, in the process that started it. Pure except for /proc.

Each section has a limit of its own; all follow from ``spec.policy.stallTimeoutSeconds``. Waiting for other ranks may
take longer than whatever those may do, so that a stuck rank is named by its own pod before any rank that waits for it,
in this pod or another, gives up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.liveness.heartbeat import Beat, Section

LEAST_LOAD_SECONDS = 600.0
"""Imports, a model from a slow disk, and storage that is away (``store.PATIENCE_SECONDS`` is 180)."""
LEAST_CHECKPOINT_SECONDS = 240.0
"""For one file of a checkpoint: the store's patience, and a minute."""
LEAST_MARGIN_SECONDS = 30.0
STOPPED = frozenset("Tt")
"""States of a process in /proc that was stopped by a signal or a debugger: it waits for nobody."""


@dataclass(frozen=True)
class Limits:
    """Limits on how long a rank may give no sign."""

    own: Mapping[Section, float]
    """Seconds by section, of what a rank does by itself."""
    margin: float
    """Seconds that a wait for others may take beyond what they may take."""
    stall: float
    """``spec.policy.stallTimeoutSeconds``"""

    @classmethod
    def of(cls, stall: float) -> Limits:
        long = max(2 * stall, LEAST_LOAD_SECONDS)
        own = dict.fromkeys(Section, float(stall)) | {
            Section.LOAD: long,
            Section.CHECKPOINT: max(float(stall), LEAST_CHECKPOINT_SECONDS),
            Section.PUBLISH: long,
            Section.DONE: float("inf"),
        }
        return cls(own, max(stall / 2, LEAST_MARGIN_SECONDS), stall)

    def for_beat(self, beat: Beat) -> float:
        if beat.section is Section.COLLECTIVE:
            return self.own[beat.around] + self.margin
        return self.own[beat.section]

    @property
    def collective_timeout(self) -> float:
        """Return the timeout of gloo and NCCL, for ranks that nobody watches: longer than any watched wait."""
        return max(v for s, v in self.own.items() if s is not Section.DONE) + 2 * self.margin


@dataclass(frozen=True)
class Stuck:
    """A rank that does not get on."""

    local_rank: int
    section: Section
    seconds: float
    """Without a sign."""
    limit: float
    stopped: bool
    """Its process was stopped by a signal."""


def find_stuck(beats: Sequence[Beat], silent: Sequence[float], limits: Limits, states: Sequence[str]) -> Stuck | None:
    """Return the rank that the others wait for; None while none is overdue.

    Several may be overdue when this is asked. A stopped process comes first, then one that waits for nobody, then the
    one that has been silent for longest.

    Args:
        beats: by local rank.
        silent: seconds since each rank's sign changed.
        limits: of the job.
        states: of the ranks' processes: the letter of /proc.

    """
    overdue = []
    for rank, (beat, seconds, state) in enumerate(zip(beats, silent, states, strict=True)):
        stopped = state in STOPPED and beat.section is not Section.DONE
        limit = min(limits.for_beat(beat), limits.stall) if stopped else limits.for_beat(beat)
        if seconds > limit:
            overdue.append(Stuck(rank, beat.section, seconds, limit, stopped))
    if not overdue:
        return None
    return min(overdue, key=lambda s: (not s.stopped, s.section is Section.COLLECTIVE, -s.seconds))


class Watchdog:
    """Asked now and then, says which rank is stuck.

    Counts the time in which it was awake itself: a pod that was frozen as a whole and goes on is not stuck.
    """

    LONGEST_NAP_SECONDS = 5.0
    """Between two looks; what is beyond was the watchdog's own sleep."""

    def __init__(self, limits: Limits, ranks: int) -> None:
        self._limits = limits
        self._seen: list[float | None] = [None] * ranks
        self._silent = [0.0] * ranks
        self._looked: float | None = None

    def look(self, beats: Sequence[Beat], now: float, states: Sequence[str]) -> Stuck | None:
        """Take in the beats at ``now`` (monotonic)."""
        nap = 0.0 if self._looked is None else min(now - self._looked, self.LONGEST_NAP_SECONDS)
        self._looked = now
        for rank, beat in enumerate(beats):
            self._silent[rank] = self._silent[rank] + nap if self._seen[rank] == beat.at else 0.0
            self._seen[rank] = beat.at
        return find_stuck(beats, self._silent, self._limits, states)


def waited_for(beats: Sequence[Beat]) -> int | None:
    """Return the rank of this pod that the others wait for at the moment; None where none of them waits, or all do."""
    busy = [
        (beat.at, rank) for rank, beat in enumerate(beats) if beat.section not in (Section.COLLECTIVE, Section.DONE)
    ]
    waits = any(beat.section is Section.COLLECTIVE for beat in beats)
    return min(busy)[1] if busy and waits else None


def process_state(pid: int) -> str:
    """Return the letter that /proc has for a process; empty where there is none, or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def describe_stuck(stuck: Stuck, rank: int, node: str, stall: float) -> str:
    """Describe a stuck rank in one paragraph for the user."""
    cause = " Its process was stopped by a signal (SIGSTOP or a debugger)." if stuck.stopped else ""
    doing = "waiting for other ranks" if stuck.section is Section.COLLECTIVE else f"in {stuck.section.title}"
    return (
        f"rank {rank} on {node} has given no sign of life for {stuck.seconds:.0f} s {doing}; the limit there is "
        f"{stuck.limit:.0f} s (spec.policy.stallTimeoutSeconds is {stall:.0f}).{cause}"
    )
