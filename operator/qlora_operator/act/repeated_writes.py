"""Space out writes of a job's status that repeat an earlier one, or change only figures and messages. No I/O.

Of two programs that replace each other's status, neither would ever stop. And words about pods that start, and about
the stages of Prepare, are written once they no longer change: on a busy cluster they would be many of the writes, each
true for a moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from qlora_api.status import QLoRAJobStatus
from qlora_operator.decide.attempts.attempt_history import without_figures
from qlora_operator.state.cache import Key
from qlora_operator.supervisor import backoff

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 300.0
KEPT = 4
"""Statuses of one job that are remembered: what another program writes may alternate, too."""
UNCHANGED_FACTOR, LONGEST_FACTOR = 2, 8
"""Multiples of ``progressSeconds``: a message of a job that starts or prepares is written once it is unchanged for the
first, or once its status is unwritten for the second."""
_NO_TIME = datetime(1970, 1, 1, tzinfo=UTC)


def fingerprint(status: QLoRAJobStatus) -> int:
    """Return a hash of a status without figures and the times of transitions."""
    status = without_figures(status)
    conditions = [c.model_copy(update={"last_transition_time": _NO_TIME}) for c in status.conditions]
    return hash(status.model_copy(update={"conditions": conditions}).model_dump_json())


@dataclass
class _History:
    """Writes of one job's status by this process."""

    at: float
    written: tuple[int, ...] = ()
    """Fingerprints of the newest ones."""
    answered: int = 0
    """Fingerprint of what the API server stored of the last one: less than was written, by an older definition."""
    repeats: int = 0
    words: int = 0
    """Hash of the message that is not written yet."""
    words_since: float = 0.0


@dataclass
class RepeatedWrites:
    """Remembers what this process wrote, and how often another program replaced it.

    A status is repeated if this process wrote it before and the stored status is not the one that the API server
    answered to its last write. Whatever is new is never held back.
    """

    clock: Callable[[], float] = time.monotonic
    _jobs: dict[Key, _History] = field(default_factory=dict)

    def forget(self, key: Key) -> None:
        """Forget what was written of a job."""
        self._jobs.pop(key, None)

    def seconds_since(self, key: Key) -> float:
        """Return how long ago a job's status was written; infinite: never."""
        return self.clock() - self._jobs[key].at if key in self._jobs else float("inf")

    def words_left(self, key: Key, words: int, progress_seconds: float) -> float:
        """Return the time until the message of a job that starts or prepares, by its hash, may be written; 0: now."""
        history, now = self._jobs.get(key), self.clock()
        if history is None:
            return 0.0
        if history.words != words:
            history.words, history.words_since = words, now
        due = max(history.at, history.words_since) + progress_seconds * UNCHANGED_FACTOR
        return max(0.0, min(due, history.at + progress_seconds * LONGEST_FACTOR) - now)

    def seconds_left(self, key: Key, stored: int, wanted: int) -> float:
        """Return for how long a status has to wait; 0: it may be written."""
        if not self._is_repeated(key, stored, wanted):
            return 0.0
        return max(0.0, self._pause(key) - self.seconds_since(key))

    def record(self, key: Key, stored: int, wanted: int, answered: int) -> float:
        """Record a write and its answer; return the seconds before the next one of the same status, 0 if it was new."""
        is_repeated = self._is_repeated(key, stored, wanted)
        history = self._jobs.setdefault(key, _History(0.0))
        history.at, history.written, history.answered = self.clock(), (*history.written, wanted)[-KEPT:], answered
        history.repeats += is_repeated
        return self._pause(key) if is_repeated else 0.0

    def _is_repeated(self, key: Key, stored: int, wanted: int) -> bool:
        history = self._jobs.get(key)
        return history is not None and wanted in history.written and stored != history.answered

    def _pause(self, key: Key) -> float:
        repeats = self._jobs[key].repeats
        return backoff(repeats, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS) if repeats else 0.0
