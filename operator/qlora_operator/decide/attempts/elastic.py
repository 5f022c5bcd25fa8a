"""Fewer workers than asked for, where ``parallelism.minWorkers`` allows it. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

from qlora_api.batch import BatchSplit, on_other_ranks
from qlora_api.status import Attempt, Reason
from qlora_operator.decide.attempts.attempt_history import batch_of
from qlora_operator.decide.attempts.attempt_outcome import Ending
from qlora_operator.decide.decision import Context
from qlora_operator.decide.pending_reason import pending_reason


def too_large(context: Context, attempt: Attempt) -> Ending | None:
    """With minWorkers: no node has taken the pods for long enough, and fewer can be tried."""
    job = context.observed.jobs.get(attempt.number)
    patience = timedelta(seconds=context.job.spec.policy.shrink_after_seconds)
    if job is None or job.ready >= context.workers(attempt) or batch_for_fewer_workers(context, attempt) is None:
        return None
    if context.now < waiting_since(context, attempt) + patience:
        return None
    reason, text = pending_reason(context.job.spec, attempt.number, context.workers(attempt), context.observed)
    return Ending(reason, f"{text}; the next attempt has fewer workers") if reason is Reason.UNSCHEDULABLE else None


def waiting_since(context: Context, attempt: Attempt) -> datetime:
    """Return when the last of its pods was made: time in a queue before that is not time without room."""
    return max((p.created for p in context.observed.pods_of(attempt.number)), default=attempt.start_time)


def batch_for_fewer_workers(context: Context, attempt: Attempt) -> BatchSplit | None:
    """Return the largest world below an attempt's that minWorkers and the global batch allow."""
    parallelism = context.job.spec.parallelism
    batch = batch_of(attempt)
    least = parallelism.min_workers or parallelism.workers
    sizes = range(context.workers(attempt) - 1, least - 1, -1)
    splits = (on_other_ranks(batch, workers * parallelism.gpus_per_worker) for workers in sizes)
    return next((split for split in splits if split), None)


def batch_for_world_size(context: Context, last: Attempt, batch: BatchSplit) -> BatchSplit:
    """Return all workers again, unless the last attempt waited for them in vain."""
    if last.reason is Reason.UNSCHEDULABLE:
        return batch_for_fewer_workers(context, last) or batch
    return on_other_ranks(batch, context.world_size) or batch
