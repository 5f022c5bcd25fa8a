"""Run one attempt of the training: build the model, resume or start, probe memory, train, evaluate, publish.

Every rank runs this code. Before a decision that concerns all of them (stop, save by time, a loss that is not finite)
its inputs are summed over the ranks, so that all ranks take the same branch and each collective has all its members.
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
from qlora_trainer.training.step_report import report_step

log = logging.getLogger(__name__)


def train(config: TrainerConfig, seen: LastSeen) -> TerminationMessage:
    """Run one attempt on this rank.

    Args:
        config: configuration of the attempt.
        seen: state for the termination message of a failure; gets the progress report here.

    Returns:
        The termination message of a completed job. Only rank 0 publishes, so only its message names the adapter.

    Raises:
        TrainerError: the attempt failed or was stopped; the error's type determines the exit code.

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
    ranks.heartbeat.enter(Section.DATA)  # loading is over; Data is also the section between two others
    answer_before(context, run)
    if not measure_base(context, run):
        preempt(context, run)
    steps = context.batches.steps(run.step, context.total_steps)
    while True:
        evaluated = is_evaluation_due(context, run)
        best = evaluated and take_evaluation(context, run)
        if best or is_checkpoint_due(context, run):
            save(context, run, with_eval=evaluated)
        if is_training_complete(context, run):
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
    message = completion_message(context, run).model_copy(update={"tasks": tasks})
    if not ranks.is_first:
        return message  # rank 0 merges and uploads alone, so no other rank waits for it in a collective
    with ranks.heartbeat.during(Section.PUBLISH):
        adapter = publish_run(context, run, tasks)
    return message.model_copy(update={"adapter": adapter})


def is_training_complete(context: TrainingContext, run: RunState) -> bool:
    """Return whether all steps are done, or evaluations have stopped improving (``evaluation.patience``)."""
    patience = context.config.spec.training.evaluation.patience
    is_out_of_patience = patience is not None and run.evaluations_without_gain >= patience
    return run.step == context.total_steps or is_out_of_patience


def is_pause_due(context: TrainingContext, run: RunState) -> bool:
    """Return whether the run has reached ``policy.pauseAtStep``."""
    pause = context.config.pause_at_step
    return pause is not None and run.step >= pause


def preempt(
    context: TrainingContext,
    run: RunState,
    error: type[PreemptedError] = PreemptedError,
    how: str = "stopped by SIGTERM",
) -> NoReturn:
    """Save a checkpoint of this step unless there is one, and end the attempt. A collective.

    Raises:
        PreemptedError: always; ``error`` is its subclass for another cause.

    """
    if run.step not in (0, run.saved_at):
        save(context, run, with_eval=run.evaluated_at == run.step)
    kept = "a checkpoint is written" if run.step else "there is nothing to keep yet"
    raise error(f"{how} at step {run.step} of {context.total_steps}; {kept}")


# ------------------------------------------------------------------------------------------------------------ the step


def train_step(context: TrainingContext, run: RunState, steps: Iterator[Step]) -> bool:
    """Run one optimizer step over the global batch. A collective.

    Returns:
        True if any rank has received SIGTERM.

    Raises:
        NonFiniteLossError: on all ranks: the loss or the gradient norm is not finite, and no update was applied.

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
    report_step(context, run, StepMetrics(loss, rate, norm, step.tokens, time.monotonic() - start, waited))
    context.recorder.memory(
        gradients
        | {MemoryComponent.OPTIMIZER_STATE.value: optimizer_bytes(context.engine)}
        | peak_bytes(context.ranks.device)
    )
    return bool(stopping)


def check_finite(name: str, value: float, run: RunState) -> None:
    """Check a value that is the same on all ranks.

    Raises:
        NonFiniteLossError: the value is infinite or NaN.

    """
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"the {name} of step {run.step + 1} is {value}: the update was not applied. A smaller "
            "spec.training.learningRate, or Float32 as spec.quantization.computeType, is the usual remedy"
        )


def next_loss_scale(before: LossScale, loss: float, norm: float, run: RunState) -> LossScale:
    """Return the loss scale for the step after this one in float16.

    If the gradients overflowed, the update was skipped; the skip is counted and the scale halved.

    Raises:
        NonFiniteLossError: the scale is already the smallest, or the loss overflowed although the gradients did not.

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


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate_now(context: TrainingContext, run: RunState) -> float | Stopped:
    """Report and return the mean loss of the evaluation rows; Stopped if a rank received SIGTERM. A collective."""
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
    """Return whether to evaluate now: before the first step, at every interval and after the last step, each once."""
    if context.data.eval is None or run.evaluated_at == run.step:
        return False
    return run.step % context.steps_between_evaluations == 0 or run.step == context.total_steps


def take_evaluation(context: TrainingContext, run: RunState) -> bool:
    """Evaluate, and return whether the adapter is the best so far; at step 0 it still equals the base. A collective."""
    loss = evaluate_now(context, run)
    if isinstance(loss, Stopped):
        preempt(context, run)  # the next attempt evaluates this step first
    context.history.evaluation(run.step, loss)
    run.evaluated_at = run.step
    if run.step == 0:
        run.base_eval_loss = loss
        return False
    return run.record_evaluation(loss)


# --------------------------------------------------------------------------------------------- checkpoints and the end


def is_checkpoint_due(context: TrainingContext, run: RunState) -> bool:
    """Return whether to save now: by time, by steps, or at the end. The result is the same on all ranks.

    At the end, because what follows replaces the weights by those of the best checkpoint (:func:`load_chosen_adapter`).
    """
    if run.step in (0, run.saved_at):
        return False
    is_interval_over = run.clock.is_due or run.step % context.steps_between_checkpoints == 0
    return is_interval_over or is_training_complete(context, run)


def completion_message(context: TrainingContext, run: RunState) -> TerminationMessage:
    """Return the termination message of a completed job, with the peak memory of any rank. A collective."""
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
