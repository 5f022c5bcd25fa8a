"""``policy.activeDeadlineSeconds``: for how long a job may still run. Pure."""

from __future__ import annotations

import math

from qlora_api.status import QLoRAJobStatus
from qlora_operator.decide.attempts.attempt_history import open_attempt
from qlora_operator.decide.decision import Context


def seconds_left(context: Context, status: QLoRAJobStatus) -> float:
    """Until the deadline, if the job runs on; infinity without one."""
    limit = context.job.spec.policy.active_deadline_seconds
    return math.inf if limit is None else limit - active_seconds(context, status)


def is_late(context: Context, status: QLoRAJobStatus) -> bool:
    """Return whether the deadline has passed."""
    return seconds_left(context, status) <= 0


def wake_after(context: Context, status: QLoRAJobStatus) -> float:
    """Return the seconds until the deadline, which no event announces; infinity while no attempt runs."""
    attempt = open_attempt(status)
    return seconds_left(context, status) if attempt and attempt.running_time else math.inf


def active_seconds(context: Context, status: QLoRAJobStatus) -> float:
    """Time of all attempts, each from when its pods were ready, as GPU-hours are counted, to its end."""
    # Of attempts that are not listed any more, or that a queue took back, only the GPU time is known: with minWorkers
    # it is too little.
    earlier = status.earlier_gpu_seconds / context.world_size
    spans = ((a.end_time or context.now) - a.running_time for a in status.attempts if a.running_time)
    return earlier + sum(span.total_seconds() for span in spans)
