"""One attempt, from top to bottom: build the model, resume or start, probe memory, loop, publish.

Every rank runs this. What decides for all (the loss is finite, a stop was asked for, a checkpoint is due) is summed
over the ranks first, so that no rank goes where the others do not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from qlora_api.contract import ExitCode, TerminationMessage, TrainerConfig
from qlora_api.status import Memory, MemoryComponent, Reason
from qlora_trainer.data.batches import Step, eval_batches
from qlora_trainer.engine.deepspeed_engine import accumulate, apply_update, join_ranks
from qlora_trainer.engine.evaluate import Stopped, evaluate, perplexity
from qlora_trainer.engine.loss_scale import LossScale
from qlora_trainer.engine.memory_use import gradient_bytes, optimizer_bytes
from qlora_trainer.engine.optim import learning_rate
from qlora_trainer.engine.seeding import seed_step
from qlora_trainer.errors import NonFiniteLossError, PausedError, PreemptedError
from qlora_trainer.liveness.heartbeat import Section
from qlora_trainer.liveness.watchdog import Limits
from qlora_trainer.reporting.metrics import MetricsRecorder, peak_bytes, serve
from qlora_trainer.reporting.rank_exit import LastSeen, progress_of
from qlora_trainer.training.context import RunState, StepMetrics, StopFlag, TrainingContext, build
from qlora_trainer.training.finish import publish_run
from qlora_trainer.training.measure_tasks import measure_adapter, measure_base
from qlora_trainer.training.peak_memory_probe import expected_seconds, probe_peak_memory
from qlora_trainer.training.resume import resume_or_start, save
from qlora_trainer.training.sample_answers import answer_after, answer_before, load_chosen_adapter

log = logging.getLogger(__name__)


def train(config: TrainerConfig, seen: LastSeen) -> TerminationMessage:
    """Run one attempt on this rank.

    Args:
        config: of the attempt.
        seen: told where to look when the attempt fails.

    Returns:
        The message of a finished job; the adapter is named on rank 0, which alone publishes.

    Raises:
        TrainerError: with the exit code that the contract gives its kind.

    """
    stop = StopFlag()
    limits = Limits.of(config.spec.policy.stall_timeout_seconds)
    ranks = join_ranks(config.device, limits.collective_timeout, seen.heartbeat)
    recorder = MetricsRecorder(config, ranks)
    seen.report = lambda: recorder.report
    port_file = Path(config.ports_dir) / f"rank-{ranks.rank}.port" if config.ports_dir else None
    port = config.metrics_port + ranks.local_rank if config.metrics_port else 0
    serve(recorder, config.metrics_host, port, port_file)

    context = build(config, ranks, recorder, stop)
    run = resume_or_start(context)
    if run.step < context.total_steps:
        recorder.stage("measuring time and memory of the largest micro-batch")
        recorder.update(expected_seconds=expected_seconds(context, run.step, probe_peak_memory(context)))
    ranks.heartbeat.enter(Section.DATA)  # where a rank is between two sections, no more in Load
    answer_before(context, run)
    if not measure_base(context, run):
        preempt(context, run)
    steps = context.batches.steps(run.step, context.total_steps)
    while True:
        evaluated = is_evaluation_due(context, run)
        best = evaluated and take_evaluation(context, run)
        if best or is_checkpoint_due(context, run):
            save(context, run, with_eval=evaluated)
        if run.step == context.total_steps or is_out_of_patience(context, run):
            break
        if is_pause_due(context, run):
            preempt(context, run, PausedError, "paused")
        stopping = train_step(context, run, steps)
        if stopping and run.step < context.total_steps:  # before an evaluation: the grace period is short
            preempt(context, run)
    load_chosen_adapter(context, run)
    answer_after(context)
    tasks = measure_adapter(context, run)
    if tasks is None:
        preempt(context, run)
    message = finished(context, run).model_copy(update={"tasks": tasks})
    if not ranks.is_first:
        return message  # no rank waits in a collective while the first one merges and uploads
    with ranks.heartbeat.during(Section.PUBLISH):
        adapter = publish_run(context, run, tasks)
    return message.model_copy(update={"adapter": adapter})


def is_pause_due(context: TrainingContext, run: RunState) -> bool:
    pause = context.config.pause_at_step
    return pause is not None and run.step >= pause


def preempt(
    context: TrainingContext,
    run: RunState,
    error: type[PreemptedError] = PreemptedError,
    how: str = "stopped by SIGTERM",
) -> NoReturn:
    """End the attempt as was asked for, with a checkpoint of where it stands. A collective.

    Raises:
        PreemptedError, or the error given: always.

    """
    if run.step not in (0, run.saved_at):
        save(context, run, with_eval=run.evaluated_at == run.step)
    kept = "a checkpoint is written" if run.step else "there is nothing to keep yet"
    raise error(f"{how} at step {run.step} of {context.total_steps}; {kept}")


# ------------------------------------------------------------------------------------------------------------ the loop


def train_step(context: TrainingContext, run: RunState, steps: Iterator[Step]) -> bool:
    """One optimizer step over the global batch. Returns whether any rank was told to stop.

    Raises:
        NonFiniteLossError: on all ranks; of a loss or a gradient that is not finite no update is applied.

    """
    start = time.monotonic()
    with context.ranks.heartbeat.during(Section.DATA):
        step = next(steps)
    waited = time.monotonic() - start
    context.recorder.add("qlora_data_wait_seconds", waited)
    seed_step(context.config.spec.training.seed, run.step, context.ranks.rank)
    with context.ranks.heartbeat.during(Section.FORWARD):
        scale = run.loss_scale.scale if run.loss_scale else None
        loss_sum = accumulate(context.engine, step, context.ranks, scale)
        clock_due = context.ranks.is_first and run.clock.has_run(context.config.spec.checkpoint.every_minutes)
        total, stopping, save_due, *own_seconds = context.ranks.sum(
            loss_sum, context.stop.is_set, clock_due, *context.pace.of_this_rank()
        )
        context.recorder.update(slowest=context.pace.slowest(own_seconds))
        loss = total / step.target_tokens
        if run.loss_scale is None:
            check_finite("loss", loss, run)
        gradients = {MemoryComponent.GRADIENTS.value: gradient_bytes(context.engine)}
        rate = learning_rate(context.config.spec.training, run.step, context.total_steps)
        with context.ranks.heartbeat.during(Section.OPTIMIZER):
            norm = apply_update(context.engine, float(context.config.spec.training.max_grad_norm), rate, scale)
        if run.loss_scale is None:
            check_finite("gradient norm", norm, run)
        else:
            run.loss_scale = next_loss_scale(run.loss_scale, loss, norm, run)
    run.advance(step)
    context.ranks.heartbeat.step = run.step
    run.clock.is_due = bool(save_due)
    report_step(context, run, step, StepMetrics(loss, rate, norm, time.monotonic() - start, waited))
    context.recorder.memory(
        gradients
        | {MemoryComponent.OPTIMIZER_STATE.value: optimizer_bytes(context.engine)}
        | peak_bytes(context.ranks.device)
    )
    return bool(stopping)


def check_finite(what: str, value: float, run: RunState) -> None:
    """End the attempt where a value that all ranks have the same is not finite.

    Raises:
        NonFiniteLossError: it is not.

    """
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"the {what} of step {run.step + 1} is {value}: the update was not applied. A smaller "
            "spec.training.learningRate, or Float32 as spec.quantization.computeType, is the usual remedy"
        )


def next_loss_scale(before: LossScale, loss: float, norm: float, run: RunState) -> LossScale:
    """Return the loss scale after a float16 step; an overflow, whose update was left out, is counted and halves it.

    Raises:
        NonFiniteLossError: there is nothing left to halve, or the loss overflowed and the gradients did not.

    """
    finite = math.isfinite(norm)
    if before.is_smallest or finite:
        check_finite("loss", loss, run)
        check_finite("gradient norm", norm, run)
    after = before.after(finite=finite)
    if not finite:
        log.warning(
            "step %d overflowed in Float16: its update was left out, the loss scale goes from %g to %g",
            run.step + 1,
            before.scale,
            after.scale,
        )
    return after


def report_step(context: TrainingContext, run: RunState, step: Step, figures: StepMetrics) -> None:
    """Send a step's metrics to the recorder, the history and the log."""
    recorder, scaling = context.recorder, run.loss_scale
    recorder.step_took(figures.seconds)
    recorder.add("qlora_tokens", step.tokens)
    report = recorder.report
    tokens = report.tokens + step.tokens
    speed = step.tokens / figures.seconds
    # smoothed over about ten steps, so that the ETA stands still
    speed = speed if report.tokens_per_second is None else 0.9 * float(report.tokens_per_second) + 0.1 * speed
    epoch = run.step / context.batches.steps_per_epoch
    left = (context.total_steps - run.step) * context.data.receipt.train_tokens / context.batches.steps_per_epoch
    for name, value in (
        ("qlora_step", run.step),
        ("qlora_epoch", epoch),
        *((("qlora_loss", figures.loss),) if math.isfinite(figures.loss) else ()),
        ("qlora_learning_rate", figures.learning_rate),
        # a skipped step is no alarm
        *((("qlora_gradient_norm", figures.gradient_norm),) if math.isfinite(figures.gradient_norm) else ()),
        ("qlora_tokens_per_second", speed),
        *((("qlora_loss_scale", scaling.scale), ("qlora_skipped_steps", scaling.skipped_steps)) if scaling else ()),
    ):
        recorder.set(name, value)
    context.history.step(
        run.step,
        epoch=epoch,
        loss=figures.loss,
        learningRate=figures.learning_rate,
        gradientNorm=figures.gradient_norm,
        tokens=step.tokens,
        seconds=figures.seconds,
        dataSeconds=figures.data_seconds,
        **({"lossScale": scaling.scale, "skippedSteps": scaling.skipped_steps} if scaling else {}),
    )
    recorder.update(
        step=run.step,
        epoch=f"{epoch:.2f}",
        loss=f"{figures.loss:.6g}" if math.isfinite(figures.loss) else report.loss,
        learning_rate=f"{figures.learning_rate:.4g}",
        tokens_per_second=f"{speed:.1f}",
        eta_seconds=round(left / speed),
        tokens=tokens,
    )
    log.info(
        "step %d/%d loss %.6f lr %.3g norm %.3f tokens/s %.0f",
        run.step,
        context.total_steps,
        figures.loss,
        figures.learning_rate,
        figures.gradient_norm,
        speed,
    )


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate_now(context: TrainingContext, run: RunState) -> float | Stopped:
    """Return the mean loss of the held-out rows, recorded as a metric. A collective."""
    data = context.data
    assert data.eval is not None
    assert data.eval_packs is not None
    with context.ranks.heartbeat.during(Section.EVALUATE):
        ranks = context.ranks
        split = context.config.batch
        micro_batches = eval_batches(data.eval, data.eval_packs, split.micro_batch_size, ranks.world_size, ranks.rank)
        micro_batches = context.recorder.count(
            micro_batches, -(-len(data.eval_packs) // (split.micro_batch_size * ranks.world_size)), "micro-batches"
        )
        loss = evaluate(context.engine, micro_batches, ranks, lambda: context.stop.is_set)
    if isinstance(loss, Stopped):
        return loss
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the evaluation loss at step {run.step} is {loss}")
    best = min(loss, run.best_eval_loss if run.best_eval_loss is not None else loss)
    context.recorder.set("qlora_eval_loss", loss)
    context.recorder.update(eval_loss=f"{loss:.6g}", best_eval_loss=f"{best:.6g}")
    log.info("step %d eval loss %.6f perplexity %.6g", run.step, loss, perplexity(loss))
    return loss


def is_evaluation_due(context: TrainingContext, run: RunState) -> bool:
    """Before the first step, every so many steps, and after the last; not twice at the same step."""
    if context.data.eval is None or run.evaluated_at == run.step:
        return False
    return run.step % context.steps_between_evaluations == 0 or run.step == context.total_steps


def take_evaluation(context: TrainingContext, run: RunState) -> bool:
    """Evaluate; True when the adapter is the best so far. Before the first step it is the base that is evaluated."""
    loss = evaluate_now(context, run)
    if isinstance(loss, Stopped):
        preempt(context, run)  # the next attempt evaluates this step first
    context.history.evaluation(run.step, loss)
    run.evaluated_at = run.step
    if run.step == 0:
        run.base_eval_loss = loss
        return False
    return run.record_evaluation(loss)


def is_out_of_patience(context: TrainingContext, run: RunState) -> bool:
    patience = context.config.spec.training.evaluation.patience
    return patience is not None and run.evaluations_without_gain >= patience


# --------------------------------------------------------------------------------------------- checkpoints and the end


def is_checkpoint_due(context: TrainingContext, run: RunState) -> bool:
    """The same on all ranks: by steps, at the end, or when rank 0's clock said so (``train_step``)."""
    if run.step in (0, run.saved_at):
        return False
    return run.clock.is_due or run.step % context.steps_between_checkpoints == 0 or run.step == context.total_steps


def finished(context: TrainingContext, run: RunState) -> TerminationMessage:
    """Return the termination message of a job that succeeded, with the largest memory over the ranks. A collective."""
    memory = context.recorder.report.memory
    measured = memory.measured
    largest = context.ranks.max(*measured.values())
    report = context.recorder.report
    return TerminationMessage(
        exit_code=ExitCode.DONE,
        reason=Reason.COMPLETED,
        message=f"step {run.step} of {context.total_steps}"
        + (
            f", eval loss {run.base_eval_loss:.5g} → {run.best_eval_loss:.5g}"
            if run.base_eval_loss is not None and run.best_eval_loss is not None
            else ""
        ),
        progress=progress_of(report),
        first_step=report.first_step,
        compute_type=report.compute_type,
        tokens=run.tokens,
        memory=Memory(predicted=memory.predicted, measured={k: int(v) for k, v in zip(measured, largest, strict=True)}),
    )
