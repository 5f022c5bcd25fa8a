"""Decide what to do when a job must stop or its attempt has ended, by one table of rules. Pure.

The table is used twice in a decision: first for the open attempt, which is closed if it has ended, and then for the
job, whose newest attempt is by then closed or still running.
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
    """Reason to stop a job. If there are several, the first in this order counts."""

    DELETED = auto()
    """The QLoRAJob is being deleted."""
    FINISHED = auto()
    """The job has succeeded or failed; containers of its pods may still run."""
    DEADLINE = auto()
    """``spec.policy.activeDeadlineSeconds`` has passed."""
    SUSPEND = auto()
    """``spec.suspend`` is set."""
    BUDGET = auto()
    """``spec.policy.budgetGpuHours`` is used up."""
    PAUSE = auto()
    """The newest attempt ended at ``spec.policy.pauseAtStep``, and no later step is asked for."""
    NONE = auto()
    """Nothing asks the job to stop."""


class AttemptState(Enum):
    """Observed state of the newest attempt."""

    NONE = auto()
    """No attempt is open."""
    RUNNING = auto()
    """The attempt is running, or not all of its pods have ended, or their termination messages are not known yet."""
    COMPLETED = auto()
    """Rank 0 exited with code 0 and a termination message."""
    NODE_LOST = auto()
    """A node was lost with one of its pods, or with the pod's termination message."""
    PAUSED = auto()
    """It ended at its step of pause, with a checkpoint."""
    DISRUPTED = auto()
    """Its pods were preempted, evicted or deleted."""
    REMOVED = auto()
    """Its Job was deleted, and all pods have ended since."""
    NEVER_RAN = auto()
    """Its Job was deleted before all its pods ran."""
    FAILED = auto()
    """Its ranks failed, or its pods could not be scheduled."""


class StopOutcome(Enum):
    """Action to take."""

    LEAVE_TO_GARBAGE_COLLECTION = auto()
    CLEAN_UP = auto()
    """Delete the Jobs that still run, and the job itself when its time to live is over."""
    CLOSE_WITH_ITS_REASON = auto()
    """Close the attempt with the reason for which it ended."""
    RECREATE_JOB = auto()
    """Create the Job of the open attempt again."""
    CLOSE_AS_SUSPENDED = auto()
    CLOSE_AS_DEADLINE_EXCEEDED = auto()
    STOP_PODS = auto()
    """Delete the running Jobs: the ranks save a checkpoint and exit."""
    SUSPEND = auto()
    """Set the condition Suspended."""
    FAIL_BY_DEADLINE = auto()
    """Set the condition Failed."""
    CONTINUE = auto()


@dataclass(frozen=True)
class StopRule:
    """Outcome of every combination of one of the stop causes, one of the attempt states, and pods or none."""

    stops: frozenset[StopCause]
    attempts: frozenset[AttemptState]
    pods: frozenset[bool]
    """True: a child Job may still create pods, or a pod has not ended."""
    outcome: StopOutcome


def _rule(
    stops: set[StopCause] | frozenset[StopCause],
    attempts: set[AttemptState] | frozenset[AttemptState],
    outcome: StopOutcome,
    pods: bool | None = None,
) -> StopRule:
    return StopRule(
        frozenset(stops), frozenset(attempts), frozenset((True, False) if pods is None else (pods,)), outcome
    )


_ALL = frozenset(AttemptState)
_LIVE = frozenset(StopCause) - {StopCause.DELETED, StopCause.FINISHED}
_PAUSE = {StopCause.SUSPEND, StopCause.BUDGET, StopCause.PAUSE}
_OPEN = {AttemptState.NONE, AttemptState.RUNNING}
_OWN_END = {AttemptState.COMPLETED, AttemptState.PAUSED, AttemptState.NODE_LOST, AttemptState.FAILED}
_WAS_TAKEN_AWAY = {AttemptState.DISRUPTED, AttemptState.REMOVED}
_TAKEN_AWAY = {*_WAS_TAKEN_AWAY, AttemptState.NEVER_RAN}

RULES = (
    _rule({StopCause.DELETED}, _ALL, StopOutcome.LEAVE_TO_GARBAGE_COLLECTION),
    _rule({StopCause.FINISHED}, _ALL, StopOutcome.CLEAN_UP),
    # If an attempt ended by itself, that counts, whatever it was asked to do in the meantime.
    _rule(_LIVE, _OWN_END, StopOutcome.CLOSE_WITH_ITS_REASON),
    _rule({StopCause.NONE}, _WAS_TAKEN_AWAY, StopOutcome.CLOSE_WITH_ITS_REASON),
    # It lost no work: its Job is created again under the same number, with the spec as it is now.
    _rule({StopCause.NONE}, {AttemptState.NEVER_RAN}, StopOutcome.RECREATE_JOB),
    _rule(_PAUSE, _TAKEN_AWAY, StopOutcome.CLOSE_AS_SUSPENDED),
    _rule({StopCause.DEADLINE}, _TAKEN_AWAY, StopOutcome.CLOSE_AS_DEADLINE_EXCEEDED),
    _rule({StopCause.NONE}, _OPEN, StopOutcome.CONTINUE),
    _rule(_PAUSE, _OPEN, StopOutcome.STOP_PODS, pods=True),
    _rule(_PAUSE, _OPEN, StopOutcome.SUSPEND, pods=False),
    # Until the last pod of the attempt has ended, the adapter may still be published.
    _rule({StopCause.DEADLINE}, {AttemptState.RUNNING}, StopOutcome.STOP_PODS),
    _rule({StopCause.DEADLINE}, {AttemptState.NONE}, StopOutcome.FAIL_BY_DEADLINE),
)
"""Every combination is in exactly one rule."""
_OUTCOMES = {
    (stop, attempt, pods): rule.outcome
    for rule in RULES
    for stop in rule.stops
    for attempt in rule.attempts
    for pods in rule.pods
}


def outcome_of(stop: StopCause, attempt: AttemptState, *, pods: bool) -> StopOutcome:
    """Return the outcome of a stop cause, the state of the newest attempt, and whether there are pods."""
    return _OUTCOMES[stop, attempt, pods]


def stop_cause(context: Context, status: QLoRAJobStatus) -> StopCause:
    """Return the reason to stop a job."""
    job, left = context.job, budget_left(context, status)
    if job.metadata.deletion_timestamp is not None:
        return StopCause.DELETED
    if is_finished(status):
        return StopCause.FINISHED
    if is_late(context, status):
        return StopCause.DEADLINE
    if job.spec.suspend:
        return StopCause.SUSPEND
    if left is not None and left <= 0:
        return StopCause.BUDGET
    return StopCause.PAUSE if _is_paused(context, status) else StopCause.NONE


def _is_paused(context: Context, status: QLoRAJobStatus) -> bool:
    """Return whether the newest attempt has paused, at the step that is asked for now or a later one."""
    step, last = context.job.spec.policy.pause_at_step, status.attempts[-1] if status.attempts else None
    return step is not None and last is not None and last.reason is Reason.PAUSED and (last.last_step or 0) >= step


def attempt_state(status: QLoRAJobStatus, ending: Ending | None) -> AttemptState:
    """Return the state of the newest attempt; ``ending`` is None until it has ended."""
    attempt = open_attempt(status)
    if attempt is None:
        return AttemptState.NONE
    if ending is None:
        return AttemptState.RUNNING
    if ending.reason is Reason.COMPLETED:
        return AttemptState.COMPLETED
    if ending.reason is Reason.PAUSED:
        return AttemptState.PAUSED
    if ending.removed and ending.reason is Reason.PREEMPTED and attempt.running_time is None:
        return AttemptState.NEVER_RAN
    if ending.removed:
        return AttemptState.REMOVED
    if ending.reason is Reason.PREEMPTED:
        return AttemptState.DISRUPTED
    return AttemptState.NODE_LOST if ending.reason is Reason.NODE_LOST else AttemptState.FAILED
