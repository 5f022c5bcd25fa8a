"""Compute the time between SIGTERM and SIGKILL from what steps and saves have taken. Pure."""

from __future__ import annotations

import math

from qlora_api.contract import ProgressReport
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decide.attempts.attempt_history import open_attempt
from qlora_operator.decide.decision import Context

LEAST_SECONDS, MOST_SECONDS = 30, 900
"""Kubernetes' own default; and how long a drained node, or a queue that wants its GPUs back, may be kept waiting. A
spot node gives what it gives, whatever a pod asks for: periodic checkpoints bound what is lost then."""
STEPS = 2
"""The step under way, and the one after which the ranks have agreed to stop."""
SAVES = 1.5
"""A save while all other jobs on a drained node save, too."""
MARGIN_SECONDS = 10
"""For the termination message, and for kubelet."""
UNIT_SECONDS = 10
"""Rounded up to this, so that status changes seldom."""


def with_grace(context: Context, status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Note in status what a stop takes by rank 0's newest report, and if it is more than the operator's setting."""
    report, attempt = context.observed.report, open_attempt(status)
    if report is None or attempt is None or report.attempt != attempt.number:
        return status
    if not report.longest_step_seconds:
        return status  # nothing is known of this attempt yet
    needed = seconds_needed(report)
    status = status.model_copy(update={"stop_seconds": needed})
    if needed <= max(context.config.trainer.grace_seconds, status.grace_seconds or 0):
        return status
    return status.model_copy(update={"grace_seconds": needed})


def seconds_needed(report: ProgressReport) -> int:
    """From SIGTERM to a saved checkpoint at most, within bounds."""
    seconds = STEPS * report.longest_step_seconds + SAVES * report.longest_save_seconds + MARGIN_SECONDS
    if not math.isfinite(seconds):
        return MOST_SECONDS
    return min(max(math.ceil(seconds / UNIT_SECONDS) * UNIT_SECONDS, LEAST_SECONDS), MOST_SECONDS)
