"""Report an optimizer step to the metrics, the history, the progress report and the log."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_trainer.reporting.metrics import MetricsRecorder
    from qlora_trainer.reporting.training_history import TrainingHistory
    from qlora_trainer.training.context import RunState, StepMetrics, TrainingContext

SPEED_SMOOTHING = 0.9
"""Weight of the earlier steps in the reported speed: an average over about ten steps keeps the ETA stable."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepProgress:
    """Progress of the training after a step."""

    epoch: float
    tokens_per_second: float
    """Smoothed over the last steps."""
    eta_seconds: float


def report_step(context: TrainingContext, run: RunState, metrics: StepMetrics) -> None:
    """Report the step that ``run`` has just finished."""
    progress = step_progress(context, run, metrics)
    set_metrics(context.recorder, run, metrics, progress)
    add_to_history(context.history, run, metrics, progress)
    update_report(context.recorder, run, metrics, progress)
    log.info(
        "step %d/%d loss %.6f lr %.3g norm %.3f tokens/s %.0f",
        run.step,
        context.total_steps,
        metrics.loss,
        metrics.learning_rate,
        metrics.gradient_norm,
        progress.tokens_per_second,
    )


def step_progress(context: TrainingContext, run: RunState, metrics: StepMetrics) -> StepProgress:
    """Estimate speed and remaining time from this step and those before."""
    speed = metrics.tokens / metrics.seconds
    if (before := context.recorder.report.tokens_per_second) is not None:
        speed = SPEED_SMOOTHING * float(before) + (1 - SPEED_SMOOTHING) * speed
    steps_per_epoch = context.batches.steps_per_epoch
    tokens_left = (context.total_steps - run.step) * context.data.receipt.train_tokens / steps_per_epoch
    return StepProgress(run.step / steps_per_epoch, speed, tokens_left / speed)


def set_metrics(recorder: MetricsRecorder, run: RunState, metrics: StepMetrics, progress: StepProgress) -> None:
    """Set the Prometheus metrics; an overflow in float16 is skipped, and so sets no loss or gradient norm."""
    recorder.step_took(metrics.seconds)
    recorder.add("qlora_tokens", metrics.tokens)
    recorder.set("qlora_step", run.step)
    recorder.set("qlora_epoch", progress.epoch)
    recorder.set("qlora_learning_rate", metrics.learning_rate)
    recorder.set("qlora_tokens_per_second", progress.tokens_per_second)
    if math.isfinite(metrics.loss):
        recorder.set("qlora_loss", metrics.loss)
    if math.isfinite(metrics.gradient_norm):
        recorder.set("qlora_gradient_norm", metrics.gradient_norm)
    if run.loss_scale is not None:
        recorder.set("qlora_loss_scale", run.loss_scale.scale)
        recorder.set("qlora_skipped_steps", run.loss_scale.skipped_steps)


def add_to_history(history: TrainingHistory, run: RunState, metrics: StepMetrics, progress: StepProgress) -> None:
    """Add the step to the history that is published with the adapter."""
    scaling = run.loss_scale
    history.step(
        run.step,
        epoch=progress.epoch,
        loss=metrics.loss,
        learningRate=metrics.learning_rate,
        gradientNorm=metrics.gradient_norm,
        tokens=metrics.tokens,
        seconds=metrics.seconds,
        dataSeconds=metrics.data_seconds,
        **({"lossScale": scaling.scale, "skippedSteps": scaling.skipped_steps} if scaling else {}),
    )


def update_report(recorder: MetricsRecorder, run: RunState, metrics: StepMetrics, progress: StepProgress) -> None:
    """Update the progress report, which the operator and ``qlora run`` read; a loss that is not finite is left out."""
    recorder.update(
        step=run.step,
        epoch=f"{progress.epoch:.2f}",
        learning_rate=f"{metrics.learning_rate:.4g}",
        tokens_per_second=f"{progress.tokens_per_second:.1f}",
        eta_seconds=round(progress.eta_seconds),
        tokens=recorder.report.tokens + metrics.tokens,
        **({"loss": f"{metrics.loss:.6g}"} if math.isfinite(metrics.loss) else {}),
    )
