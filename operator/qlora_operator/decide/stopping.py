"""Decide what follows when a job is to stop or its attempt has ended: one table. Pure.

A decision looks it up twice: first for the open attempt, which is closed where it has ended, and then for the job,
whose newest attempt is by then closed or goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from qlora_api.status import QLoRAJobStatus, Reason
from qlora_operator.decide.attempts.attempt_history import budget_left, open_attempt
from qlora_operator.decide.attempts.attempt_outcome import Ending
from qlora_operator.decide.conditions import is_finished
from qlora_operator.decide.deadline import is_late
from qlora_operator.decide.decision import Context


class StopCause(Enum):
    """Reason for which a job is to stop. Of several the first in this order counts."""

    DELETED = auto()
    """Somebody deletes the QLoRAJob."""
    FINISHED = auto()
    """It has succeeded or failed; containers of its pods may still run."""
    DEADLINE = auto()
    """``spec.policy.activeDeadlineSeconds`` has passed."""
    SUSPEND = auto()
    """``spec.suspend`` is set."""
    BUDGET = auto()
    """``spec.policy.budgetGpuHours`` is used up."""
    NO = auto()


class AttemptState(Enum):
    """State of the newest attempt, as it is seen."""

    NONE = auto()
    """No attempt is open."""
    RUNNING = auto()
    """It goes on, or its pods have not all ended, or what they wrote is not there yet."""
    COMPLETED = auto()
    """Rank 0 exited with code 0 and a termination message."""
    NODE_LOST = auto()
    """A node is gone with a pod of it, or with what the pod would have written."""
    DISRUPTED = auto()
    """Its pods were taken away: by preemption, eviction, or by whoever deleted them."""
    REMOVED = auto()
    """Its Job was deleted, and all pods have ended since."""
    NEVER_RAN = auto()
    """Its Job was deleted before all its pods ran."""
    FAILED = auto()
    """It ended by what its ranks did, or found no room."""


class StopOutcome(Enum):
    """Action that follows."""

    LEAVE_TO_GARBAGE_COLLECTION = auto()
    CLEAN_UP = auto()
    """Delete the Jobs that still run, and the job itself when its time to live is over."""
    CLOSE_AS_SEEN = auto()
    """Close the attempt with the reason that is seen."""
    MAKE_ANEW = auto()
    """Create the Job of the open attempt once more."""
    CLOSE_AS_SUSPENDED = auto()
    CLOSE_AS_DEADLINE_EXCEEDED = auto()
    STOP_PODS = auto()
    """Delete the Jobs that run: the ranks write a checkpoint and leave."""
    SUSPEND = auto()
    """Write that the job is suspended."""
    FAIL_BY_DEADLINE = auto()
    """Write that the job has failed."""
    GO_ON = auto()


@dataclass(frozen=True)
class Row:
    """Combinations with one outcome: each of the stops, with each of the attempts, and with pods or without."""

    stops: frozenset[StopCause]
    attempts: frozenset[AttemptState]
    pods: frozenset[bool]
    """True: a child Job may still make pods, or a pod has not ended."""
    outcome: StopOutcome


def _row(
    stops: set[StopCause] | frozenset[StopCause],
    attempts: set[AttemptState] | frozenset[AttemptState],
    outcome: StopOutcome,
    pods: bool | None = None,
) -> Row:
    return Row(frozenset(stops), frozenset(attempts), frozenset((True, False) if pods is None else (pods,)), outcome)


_ALL = frozenset(AttemptState)
_LIVE = frozenset(StopCause) - {StopCause.DELETED, StopCause.FINISHED}
_PAUSE = {StopCause.SUSPEND, StopCause.BUDGET}
_OPEN = {AttemptState.NONE, AttemptState.RUNNING}
_OWN_END = {AttemptState.COMPLETED, AttemptState.NODE_LOST, AttemptState.FAILED}
_WAS_TAKEN_AWAY = {AttemptState.DISRUPTED, AttemptState.REMOVED}
_TAKEN_AWAY = {*_WAS_TAKEN_AWAY, AttemptState.NEVER_RAN}

TABLE = (
    _row({StopCause.DELETED}, _ALL, StopOutcome.LEAVE_TO_GARBAGE_COLLECTION),
    _row({StopCause.FINISHED}, _ALL, StopOutcome.CLEAN_UP),
    # What an attempt did by itself counts, whatever it was told to do meanwhile.
    _row(_LIVE, _OWN_END, StopOutcome.CLOSE_AS_SEEN),
    _row({StopCause.NO}, _WAS_TAKEN_AWAY, StopOutcome.CLOSE_AS_SEEN),
    # Nothing of it is lost: it follows what was corrected meanwhile under its own number.
    _row({StopCause.NO}, {AttemptState.NEVER_RAN}, StopOutcome.MAKE_ANEW),
    _row(_PAUSE, _TAKEN_AWAY, StopOutcome.CLOSE_AS_SUSPENDED),
    _row({StopCause.DEADLINE}, _TAKEN_AWAY, StopOutcome.CLOSE_AS_DEADLINE_EXCEEDED),
    _row({StopCause.NO}, _OPEN, StopOutcome.GO_ON),
    _row(_PAUSE, _OPEN, StopOutcome.STOP_PODS, pods=True),
    _row(_PAUSE, _OPEN, StopOutcome.SUSPEND, pods=False),
    # Until the last pod of the attempt has ended, the adapter may still be published.
    _row({StopCause.DEADLINE}, {AttemptState.RUNNING}, StopOutcome.STOP_PODS),
    _row({StopCause.DEADLINE}, {AttemptState.NONE}, StopOutcome.FAIL_BY_DEADLINE),
)
"""Every combination is in exactly one row."""
_OUTCOMES = {
    (stop, attempt, pods): row.outcome
    for row in TABLE
    for stop in row.stops
    for attempt in row.attempts
    for pods in row.pods
}


def outcome_of(stop: StopCause, attempt: AttemptState, *, pods: bool) -> StopOutcome:
    """Return what follows from why a job is to stop, how its attempt is, and whether there are pods."""
    return _OUTCOMES[stop, attempt, pods]


def stop_cause(context: Context, status: QLoRAJobStatus) -> StopCause:
    """Return why a job is to stop."""
    job, left = context.job, budget_left(context, status)
    if job.metadata.deletion_timestamp is not None:
        return StopCause.DELETED
    if is_finished(status):
        return StopCause.FINISHED
    if is_late(context, status):
        return StopCause.DEADLINE
    if job.spec.suspend:
        return StopCause.SUSPEND
    return StopCause.BUDGET if left is not None and left <= 0 else StopCause.NO


def attempt_state(status: QLoRAJobStatus, ending: Ending | None) -> AttemptState:
    """Return what is seen of the newest attempt; ``ending`` is how it ended, None while it has not."""
    attempt = open_attempt(status)
    if attempt is None:
        return AttemptState.NONE
    if ending is None:
        return AttemptState.RUNNING
    if ending.reason is Reason.COMPLETED:
        return AttemptState.COMPLETED
    if ending.removed and ending.reason is Reason.PREEMPTED and attempt.running_time is None:
        return AttemptState.NEVER_RAN
    if ending.removed:
        return AttemptState.REMOVED
    if ending.reason is Reason.PREEMPTED:
        return AttemptState.DISRUPTED
    return AttemptState.NODE_LOST if ending.reason is Reason.NODE_LOST else AttemptState.FAILED
