"""Decide how attempts are closed and how a job ends, and what is cleared away then. Pure."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Literal

from qlora_api.lifecycle import FinishJob, after_attempt
from qlora_api.status import Attempt, ConditionType, QLoRAJobStatus, Reason
from qlora_operator.decide.attempts.attempt_history import measured, open_attempt, with_closed_attempt
from qlora_operator.decide.attempts.attempt_outcome import as_suspended, closed, ending_of, is_lost
from qlora_operator.decide.attempts.elastic import too_large
from qlora_operator.decide.attempts.grace_period import with_grace
from qlora_operator.decide.conditions import with_condition
from qlora_operator.decide.decision import Context, Decision, Note
from qlora_operator.decide.stopping import StopCause, StopOutcome, attempt_state, outcome_of, stop_cause
from qlora_operator.state.observed import JobState, ObservedJob


def clean_up(context: Context, status: QLoRAJobStatus) -> Decision:
    """Clear away what still runs of a job that is over, and the job itself when its time has come."""
    ttl = context.job.spec.policy.ttl_seconds_after_finished
    running = running_jobs(context)
    if ttl is None or status.completion_time is None:
        return Decision(status, delete=running)
    left = (status.completion_time + timedelta(seconds=ttl) - context.now).total_seconds()
    return Decision(status, delete=running, delete_self=left <= 0, wake_after=max(left, 0) or None)


def running_jobs(context: Context) -> tuple[ObservedJob, ...]:
    """Return the child Jobs that may have pods that run."""
    return tuple(
        j
        for j in context.observed.jobs.values()
        if not j.deleting and j.state in (JobState.ACTIVE, JobState.SUSPENDED, JobState.FAILING)
    )


def has_pods(context: Context) -> bool:
    """Return whether there are pods that have not ended, or a Job that may still make some."""
    return bool(running_jobs(context)) or any(
        not p.ended and not is_lost(p, context.observed) for p in context.observed.living
    )


def fail_by_deadline(context: Context, status: QLoRAJobStatus) -> Decision:
    """Return the decision in which a job fails by its deadline."""
    end = FinishJob(False, Reason.DEADLINE_EXCEEDED, deadline_words(context))
    note = Note("Warning", end.reason.value, end.message)
    return replace(clean_up(context, with_finish(context, status, end)), notes=(note,))


def deadline_words(context: Context) -> str:
    """Return the message of a job whose deadline has passed."""
    limit = context.job.spec.policy.active_deadline_seconds
    return f"its attempts together ran longer than spec.policy.activeDeadlineSeconds ({limit})"


# -------------------------------------------------------------------------------------------------- how attempts end


def close_attempt(context: Context, status: QLoRAJobStatus) -> tuple[QLoRAJobStatus, tuple[Note, ...]]:
    """Close the open attempt if it ended, and the job if nothing can follow."""
    status = with_grace(context, measured(context, status))
    attempt = open_attempt(status)
    if attempt is None:
        return status, ()
    ending = ending_of(attempt.number, context.workers(attempt), context.observed) or too_large(context, attempt)
    if ending is None:
        return status, ()
    stop = stop_cause(context, status)
    outcome = outcome_of(stop, attempt_state(status, ending), pods=has_pods(context))
    if outcome is StopOutcome.RECREATE_JOB:
        return status, ()
    if outcome is StopOutcome.CLOSE_AS_SUSPENDED:
        ending = as_suspended(attempt, ending)
    elif outcome is StopOutcome.CLOSE_AS_DEADLINE_EXCEEDED:
        ending = replace(ending, reason=Reason.DEADLINE_EXCEEDED, message=deadline_words(context))
    attempt = closed(attempt, ending, context.observed)
    status = with_closed_attempt(context, status, attempt, ending)
    if outcome is StopOutcome.CLOSE_AS_DEADLINE_EXCEEDED:
        return status, ()
    decision = after_attempt(context.job.spec.policy, status.attempts)
    if stop is StopCause.DEADLINE and not isinstance(decision, FinishJob):
        return status, ()
    if isinstance(decision, FinishJob):
        kind: Literal["Normal", "Warning"] = "Normal" if decision.succeeded else "Warning"
        where = f"; the adapter is published: {status.adapter.uri}" if decision.succeeded and status.adapter else ""
        note = Note(kind, decision.reason.value, f"{decision.message}{where}")
        return with_finish(context, status, decision), (note,)
    if outcome is StopOutcome.CLOSE_AS_SUSPENDED:
        return status, (Note("Normal", "Suspended", _attempt_words(attempt)),)
    if ending.reason is Reason.PAUSED:
        return status, (Note("Normal", "Paused", _attempt_words(attempt)),)
    return status, (Note("Warning", ending.reason.value, f"{_attempt_words(attempt)}; another attempt follows"),)


def _attempt_words(attempt: Attempt) -> str:
    where = f" on {attempt.node}" if attempt.node else ""
    return f"attempt {attempt.number}{where}: {attempt.message}"


def with_finish(context: Context, status: QLoRAJobStatus, end: FinishJob) -> QLoRAJobStatus:
    """Return a status that says how the job ended."""
    kind = ConditionType.SUCCEEDED if end.succeeded else ConditionType.FAILED
    status = with_condition(context, status, ConditionType.RUNNING, end.reason, "", is_true=False)
    status = with_condition(context, status, kind, end.reason, end.message, is_true=True)
    return status.model_copy(update={"state": kind, "reason": end.reason, "completion_time": context.now, "eta": ""})
