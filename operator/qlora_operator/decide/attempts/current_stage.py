"""Tell what a job does besides training steps, as rank 0 or Prepare reported it last. Pure."""

from __future__ import annotations

from datetime import timedelta

from qlora_api.contract import TRAINING, ProgressReport
from qlora_api.status import JobStage, QLoRAJobStatus, Reason
from qlora_operator.decide.decision import Context

TOLERANCE = timedelta(seconds=5)
"""Between two estimates of when one stage began: an operator that has just started makes a new one."""


def with_stage(context: Context, status: QLoRAJobStatus, attempt: int | None) -> QLoRAJobStatus:
    """Return the status with the stage that an attempt, or Prepare, is in; None: no pod is in any."""
    if attempt is None:
        return status.model_copy(update={"stage": None})
    report, start, before = _report_of(context, attempt), context.observed.stage_start, status.stage
    if report is None or start is None:  # not asked yet: as it was before this operator started
        return status
    if before and before.name == report.doing and abs(before.start_time - start) <= TOLERANCE:
        return status
    stage = None if report.doing == TRAINING else JobStage(name=report.doing, start_time=start)
    return status.model_copy(update={"stage": stage})


def without_past_stage(status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Return the status without a stage where neither Prepare nor an attempt is at work."""
    is_at_work = status.reason in (Reason.PREPARING, Reason.TRAINING)
    return status if is_at_work else status.model_copy(update={"stage": None})


def doing(context: Context, attempt: int) -> str:
    """Return what an attempt does, as the end of a sentence; empty: it is not known."""
    report = _report_of(context, attempt)
    return f", {report.doing}" if report else ""


def _report_of(context: Context, attempt: int) -> ProgressReport | None:
    report = context.observed.report
    return report if report and report.attempt == attempt else None
