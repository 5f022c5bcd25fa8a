"""Take in attempts that were started and are not in status, because the operator died in between. Pure."""

from __future__ import annotations

from dataclasses import replace

from pydantic import ValidationError

from qlora_api.status import Attempt, QLoRAJobStatus, Reason
from qlora_operator.decide.attempts.attempt_history import batch_of, open_attempt, with_attempt, with_closed_attempt
from qlora_operator.decide.attempts.attempt_outcome import Ending, closed, ending_of
from qlora_operator.decide.decision import Context
from qlora_operator.decide.prepare_result import is_for, with_prepared
from qlora_operator.state.observed import PREPARE, ObservedJob, planned


def adopted(context: Context, status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Take in attempts that were started and did not get into status, because the operator died in between."""
    newest = max((a.number for a in status.attempts), default=PREPARE)
    for number in sorted(n for n in context.observed.jobs if n > newest):
        job = context.observed.jobs[number]
        try:
            attempt = Attempt.model_validate({**planned(job), "number": number, "startTime": job.created})
        except ValidationError:
            continue  # not of this operator's making
        if not _is_planned_for(context, attempt):
            continue
        status = _closed_by_the_next(context, _prepared_before(context, status), job)
        status = with_attempt(status, attempt)
    return status


def _is_planned_for(context: Context, attempt: Attempt) -> bool:
    """Return whether an attempt has no more ranks than the job asks for, and its batch."""
    split = batch_of(attempt)
    whole = context.job.spec.training.global_batch_size
    return split.world_size <= context.world_size and split.global_batch_size == whole


def _prepared_before(context: Context, status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Return the result of Prepare that was acted on and not written down."""
    if status.prepared or status.attempts or PREPARE not in context.observed.jobs:
        return status
    ending = ending_of(PREPARE, 1, context.observed)
    result = ending.termination_message.prepared if ending and ending.termination_message else None
    return with_prepared(context, status, result) if result and is_for(context, result) else status


def _closed_by_the_next(context: Context, status: QLoRAJobStatus, decision: ObservedJob) -> QLoRAJobStatus:
    """Return the end of an open attempt that was decided, acted on, and not written down."""
    attempt = open_attempt(status)
    if attempt is None:
        return status
    ending = ending_of(attempt.number, context.workers(attempt), context.observed)
    ending = ending or Ending(Reason.PREEMPTED, f"attempt {decision.attempt} took its place")
    return with_closed_attempt(
        context, status, closed(attempt, ending, replace(context.observed, now=decision.created)), ending
    )
