"""Decide what to create, what to delete and what to write into the status of one job. Pure.

The functions are in the order of a job's life: prepare, start an attempt, watch it run.
"""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from qlora_api.batch import BatchSplit, split_batch
from qlora_api.job import QLoRAJob
from qlora_api.lifecycle import FinishJob, after_attempt
from qlora_api.spec import Gang
from qlora_api.status import Attempt, ConditionType, QLoRAJobStatus, Reason
from qlora_operator.config import OperatorConfig
from qlora_operator.decide.attempts.adoption import adopted
from qlora_operator.decide.attempts.attempt_history import (
    budget_left,
    gpu_seconds,
    open_attempt,
    with_attempt,
    with_clock_stopped,
)
from qlora_operator.decide.attempts.attempt_outcome import Ending, ending_of, is_cut_short, is_lost
from qlora_operator.decide.attempts.current_stage import doing, with_stage, without_past_stage
from qlora_operator.decide.attempts.elastic import batch_for_fewer_workers, batch_for_world_size, waiting_since
from qlora_operator.decide.attempts.outdated import is_contested, is_outdated
from qlora_operator.decide.conditions import is_condition_true, with_condition, with_summary
from qlora_operator.decide.deadline import wake_after
from qlora_operator.decide.decision import Context, Decision, Note
from qlora_operator.decide.events import ranks, transitions
from qlora_operator.decide.job_end import (
    clean_up,
    close_attempt,
    deadline_words,
    fail_by_deadline,
    has_pods,
    running_jobs,
    with_finish,
)
from qlora_operator.decide.pending_reason import pending_reason, prepare_queued
from qlora_operator.decide.prepare_result import NOT_PREPARED, is_for, with_correction, with_prepared
from qlora_operator.decide.stopping import StopCause, StopOutcome, attempt_state, outcome_of, stop_cause
from qlora_operator.manifests import render
from qlora_operator.manifests.profiles import prepare_of, profile_problem
from qlora_operator.names import key_secret_name
from qlora_operator.state.observed import PREPARE, JobState, Observed, ObservedJob, PodSnapshot

REFUSED_SECONDS = 15.0
"""Delay before a request that the API server refused is tried again."""
LOOK_AGAIN_SECONDS = 5.0
"""For what no event announces: a pod that outlasts its deletion, a result that is late."""
REMAKE_PAUSE = timedelta(seconds=5)
"""Between two Jobs of one attempt, should somebody delete each at once."""
DEADLINE = "DeadlineExceeded"
"""The kubelet's reason for a pod that outlived its activeDeadlineSeconds."""
_ENDING = (JobState.COMPLETE, JobState.FAILED, JobState.FAILING)


def plan(job: QLoRAJob, observed: Observed, config: OperatorConfig, gang: Gang) -> Decision:
    """Decide what follows for one job; time comes in as ``observed.now``."""
    if problem := profile_problem(job.spec.scheduling, config):
        observed = replace(observed, create_error=problem)
    context = Context(job, observed, config, gang)
    before = job.status or QLoRAJobStatus()
    match _outcome(context, before):
        case StopOutcome.LEAVE_TO_GARBAGE_COLLECTION:
            return Decision(before)
        case StopOutcome.CLEAN_UP:
            return clean_up(context, _as_observed(context, before))
    status, notes = close_attempt(context, with_clock_stopped(context, adopted(context, before)))
    decision = _decide(context, _as_observed(context, status))
    notes = (*notes, *decision.notes, *transitions(before, decision.status))
    return replace(decision, status=with_summary(context, without_past_stage(decision.status)), notes=notes)


def _outcome(context: Context, status: QLoRAJobStatus) -> StopOutcome:
    return outcome_of(stop_cause(context, status), attempt_state(status, None), pods=has_pods(context))


def _as_observed(context: Context, status: QLoRAJobStatus) -> QLoRAJobStatus:
    return status.model_copy(update={"observed_generation": context.job.metadata.generation or 0})


def _decide(context: Context, status: QLoRAJobStatus) -> Decision:
    """Decide for a job whose attempt, if it has ended, is closed."""
    match _outcome(context, status):
        case StopOutcome.CLEAN_UP:
            return clean_up(context, status)
        case StopOutcome.FAIL_BY_DEADLINE:
            return fail_by_deadline(context, status)
        case StopOutcome.STOP_PODS:
            return _stop_pods(context, status)
        case StopOutcome.SUSPEND:
            decision = _suspend(context, status)
        case StopOutcome.CONTINUE:
            decision = _continue_job(context, status)
        case outcome:
            raise AssertionError(f"{outcome} is for an attempt that has ended and is still open")
    return _with_wake_up(context, _without_ended_jobs(context, decision))


def _without_ended_jobs(context: Context, decision: Decision) -> Decision:
    """Delete running Jobs of attempts that ended by a decision: their node is lost, or they were too large."""
    ended = {a.number for a in decision.status.attempts if a.end_time}
    if decision.status.prepared or decision.status.attempts:
        ended.add(PREPARE)  # a container that is not the operator's keeps its pod from ending
    running = tuple(j for j in running_jobs(context) if j.attempt in ended and j not in decision.delete)
    return replace(decision, delete=(*decision.delete, *running))


def _with_wake_up(context: Context, decision: Decision) -> Decision:
    """Decide again at the deadline, which no event announces."""
    wake = min(decision.wake_after or math.inf, wake_after(context, decision.status))
    return replace(decision, wake_after=None if wake == math.inf else wake)


# -------------------------------------------------------------------------------------------------------- what is next


def _continue_job(context: Context, status: QLoRAJobStatus) -> Decision:
    if is_condition_true(status.conditions, ConditionType.SUSPENDED):
        status = with_condition(context, status, ConditionType.SUSPENDED, Reason.PENDING, "resumed", is_true=False)
    if context.config.prepare.enabled and status.prepared is None and not status.attempts:
        return _prepare(context, status)
    attempt = open_attempt(status)
    if attempt is not None:
        return _continue_attempt(context, status, attempt)
    return _start(context, status)


def _suspend(context: Context, status: QLoRAJobStatus) -> Decision:
    """The last pod is gone."""
    stop = stop_cause(context, status)
    reason, remedy = Reason.SUSPENDED, "set spec.suspend to false to resume"
    if stop is StopCause.BUDGET:
        hours = context.job.spec.policy.budget_gpu_hours
        reason = Reason.BUDGET_REACHED
        remedy = f"spec.policy.budgetGpuHours ({hours}) is used up, including the time to stop; raise it to resume"
    if stop is StopCause.PAUSE:
        reason = Reason.PAUSED
        remedy = (
            f"spec.policy.pauseAtStep ({context.job.spec.policy.pause_at_step}) is reached; raise or remove it to"
            " resume"
        )
    lost = next((p for p in context.observed.living if is_lost(p, context.observed)), None)
    text = f"no pod runs{f', as far as is known of node {lost.node}, which is lost' if lost else ''}; {remedy}"
    status = with_condition(context, status, ConditionType.RUNNING, reason, text, is_true=False)
    status = with_condition(context, status, ConditionType.SUSPENDED, reason, text, is_true=True)
    return Decision(status.model_copy(update={"state": ConditionType.SUSPENDED, "reason": reason, "eta": ""}))


def _stop_pods(context: Context, status: QLoRAJobStatus) -> Decision:
    text = "the ranks save a checkpoint and exit"
    if stop_cause(context, status) is StopCause.DEADLINE:
        text = f"{deadline_words(context)}: the ranks exit"
    status = with_condition(context, status, ConditionType.RUNNING, Reason.SUSPENDING, text, is_true=False)
    status = status.model_copy(update={"state": "Pending", "reason": Reason.SUSPENDING})
    return Decision(status, delete=running_jobs(context), wake_after=LOOK_AGAIN_SECONDS)


def _prepare(context: Context, status: QLoRAJobStatus) -> Decision:
    """Check model and rows in a pod without GPUs, and continue with its result."""
    job = context.observed.jobs.get(PREPARE)
    status = status.model_copy(update={"start_time": status.start_time or context.now})
    wanted = partial(render.prepare, context.job, context.config, context.observed.memory_correction)
    outdated = job is not None and is_outdated(context, job, wanted)
    if job is not None and outdated and is_contested(context, job):
        return Decision(status, contested=job)
    if context.observed.create_error:
        return _wait_for_prepare(context, status, wake_after=REFUSED_SECONDS)
    if job is None:
        created = (render.key_secret(context.job), wanted())
        return _wait_for_prepare(context, with_correction(context, status), create=created)
    if job.deleting:
        return _wait_for_prepare(context, status)
    if outdated and not any(pod.trainer_ready or pod.ended for pod in context.observed.pods_of(PREPARE)):
        return _wait_for_prepare(context, status, delete=(job,))
    ending = _prepare_ending(context, job)
    if ending is None:
        is_late = job.state in (JobState.COMPLETE, JobState.FAILED)
        return _wait_for_prepare(context, status, wake_after=LOOK_AGAIN_SECONDS if is_late else None)
    if job.state is JobState.COMPLETE and ending.reason is Reason.PREEMPTED:
        # Its pod is gone, and with it its termination message. All results are in the cache.
        return _wait_for_prepare(context, status, delete=(job,))
    return _prepared_or_failed(context, status, ending)


def _prepare_ending(context: Context, job: ObservedJob) -> Ending | None:
    """Return how Prepare ended; None while it runs, or until its termination message is known."""
    pods, ending = context.observed.pods_of(PREPARE), ending_of(PREPARE, 1, context.observed)
    if ending is not None and any(pod.held for pod in pods):
        return ending
    hung = next((pod for pod in pods if pod.pod_reason == DEADLINE), None)
    if hung is not None and job.state is not JobState.COMPLETE:
        return Ending(Reason.DEADLINE_EXCEEDED, _deadline_message(context, hung), node=hung.node)
    return ending if job.state in (JobState.COMPLETE, JobState.FAILED) else None


def _prepared_or_failed(context: Context, status: QLoRAJobStatus, ending: Ending) -> Decision:
    if ending.reason is not Reason.COMPLETED and ending.exit_code != 0:
        return _prepare_failed(context, status, ending)
    result = ending.termination_message.prepared if ending.termination_message else None
    if result is None or not is_for(context, result):
        return _prepare_failed(context, status, Ending(Reason.CRASHED, NOT_PREPARED, 0, ending.node))
    return _start(context, with_prepared(context, status, result))


def _prepare_failed(context: Context, status: QLoRAJobStatus, ending: Ending) -> Decision:
    status = with_condition(context, status, ConditionType.PREPARED, ending.reason, ending.message, is_true=False)
    end = FinishJob(False, ending.reason, ending.message)
    note = Note("Warning", ending.reason.value, ending.message)
    return replace(clean_up(context, with_finish(context, status, end)), notes=(note,))


def _deadline_message(context: Context, pod: PodSnapshot) -> str:
    limit = context.config.prepare.deadline_seconds
    text = (
        f"Prepare was stopped after {limit} s on node {pod.node} (prepare.deadlineSeconds, a value of the operator's "
        "chart): a source does not answer, or there are more rows than it can read in that time"
    )
    message = pod.termination_message.message if pod.termination_message else pod.message[-500:]
    return f"{text}; its termination message: {message}" if message else text


def _wait_for_prepare(
    context: Context,
    status: QLoRAJobStatus,
    create: tuple[dict[str, Any], ...] = (),
    delete: tuple[ObservedJob, ...] = (),
    wake_after: float | None = None,
) -> Decision:
    reason, text = pending_reason(context.job.spec, PREPARE, 1, context.observed)
    if reason is Reason.QUEUED:
        text = prepare_queued(prepare_of(context.job.spec, context.config).queue)
    works = False
    if reason is Reason.STARTING:
        reason, text = Reason.PREPARING, "model and rows are checked before GPUs are requested"
        works = any(pod.trainer_ready for pod in context.observed.pods_of(PREPARE))
        status = with_stage(context, status, PREPARE if works else None)
        text = f"{status.stage.name}: {text}" if status.stage else text
    status = with_condition(context, status, ConditionType.PREPARED, reason, text, is_true=False)
    status = status.model_copy(update={"state": "Pending", "reason": reason})
    return Decision(status, create, delete, wake_after=wake_after, watch_progress=works)


def _start(context: Context, status: QLoRAJobStatus) -> Decision:
    """Start the next attempt, or wait until it may start."""
    batch = status.prepared.batch if status.prepared else split_batch(context.job.spec, context.world_size)
    checkpointing = render.checkpoints_gradients(context.job.spec, context.config, status.prepared)
    if status.attempts:
        decision = after_attempt(context.job.spec.policy, status.attempts)
        if isinstance(decision, FinishJob):  # a limit was lowered while the job waited
            return clean_up(context, with_finish(context, status, decision))
        batch = batch_for_world_size(context, status.attempts[-1], decision.batch)
        checkpointing = decision.gradient_checkpointing
        ended = status.attempts[-1].end_time or context.now
        left = (ended + timedelta(seconds=decision.wait_seconds) - context.now).total_seconds()
        if left > 0 and status.attempts[-1].reason not in (Reason.SUSPENDED, Reason.PAUSED):
            text = f"attempt {status.attempts[-1].number} ended: {status.attempts[-1].message}"
            return _pending(context, status, Reason.BACKING_OFF, text, wake_after=left)
    if not status.attempts and status.prepared is None and not context.observed.create_error:
        status = with_correction(context, status)
    return _create(context, status, _planned_attempt(context, status, batch, checkpointing=checkpointing))


def _create(context: Context, status: QLoRAJobStatus, attempt: Attempt) -> Decision:
    """Have an attempt's Job created."""
    reason, text = pending_reason(context.job.spec, attempt.number, context.workers(attempt), context.observed)
    if context.observed.create_error:
        return _pending(context, status, reason, text, wake_after=REFUSED_SECONDS)
    job = _rendered(context, status, attempt)
    return _pending(context, with_attempt(status, attempt), reason, text, create=job)


def _rendered(context: Context, status: QLoRAJobStatus, attempt: Attempt) -> tuple[dict[str, Any], ...]:
    correction = context.observed.memory_correction
    return render.attempt(context.job, context.config, context.gang, attempt, status, correction)


def _recreate(context: Context, status: QLoRAJobStatus, attempt: Attempt) -> Decision:
    """Create the Job of an attempt anew if it was deleted before it ran, with a limit on repeats."""
    left = (attempt.start_time + REMAKE_PAUSE - context.now).total_seconds()
    if left > 0:
        return _pending(context, status, Reason.STARTING, _recreate_text(attempt), wake_after=left)
    return _create(context, status, attempt.model_copy(update={"start_time": context.now, "job_uid": None}))


def _recreate_text(attempt: Attempt) -> str:
    return f"attempt {attempt.number} has not run yet, and is created again"


def _planned_attempt(context: Context, status: QLoRAJobStatus, batch: BatchSplit, *, checkpointing: bool) -> Attempt:
    return Attempt(
        number=max((a.number for a in status.attempts), default=0) + 1,
        world_size=batch.world_size,
        micro_batch_size=batch.micro_batch_size,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        gradient_checkpointing=checkpointing,
        grace_seconds=status.grace_seconds,
        key_secret=key_secret_name(context.job.metadata.uid or ""),
        start_time=context.now,
    )


def _continue_attempt(context: Context, status: QLoRAJobStatus, attempt: Attempt) -> Decision:
    """The open attempt has not ended."""
    job = context.observed.jobs.get(attempt.number)
    if attempt.running_time is None and job is None and all(p.ended for p in context.observed.pods_of(attempt.number)):
        return _recreate(context, status, attempt)
    overdue = any(p.deletion_due for p in context.observed.pods_of(attempt.number) if not p.ended)
    wake = LOOK_AGAIN_SECONDS if overdue or (job and job.state in _ENDING) else None
    if job is not None and is_cut_short(attempt.number, context.observed):
        return Decision(status, delete=() if job.deleting else (job,), wake_after=LOOK_AGAIN_SECONDS)
    if job is not None and job.state is JobState.ACTIVE and _all_train(context, attempt, job):
        nodes = sorted({p.node for p in context.observed.pods_of(attempt.number) if not p.gone and p.node})
        since = attempt.running_time or context.now
        attempt = attempt.model_copy(update={"node": ", ".join(nodes)[:4096], "running_time": since})
        status = with_attempt(status, attempt)
        report = context.observed.report
        if report:  # with the other figures, or a restart of the operator would write all running jobs anew
            status = status.model_copy(update={"gpu_seconds": gpu_seconds(status, context.now)})
        status, does = with_stage(context, status, attempt.number), doing(context, attempt.number)
        text = f"attempt {attempt.number}: {ranks(attempt.world_size)} on {', '.join(nodes) or 'their nodes'}{does}"
        if (left := budget_left(context, status)) is not None:
            wake = min(wake or math.inf, max(left / attempt.world_size, 1))
        status = with_condition(context, status, ConditionType.RUNNING, Reason.TRAINING, text, is_true=True)
        status = status.model_copy(update={"state": ConditionType.RUNNING, "reason": Reason.TRAINING})
        return Decision(status, wake_after=wake, watch_progress=True)
    if is_condition_true(status.conditions, ConditionType.RUNNING) and (job is None or job.state in _ENDING):
        # The last pods end: nothing to say yet that status does not say.
        return Decision(status, wake_after=wake)
    waiting_job = job if attempt.running_time is None else None
    if waiting_job and is_outdated(context, waiting_job, lambda: _rendered(context, status, attempt)[-1]):
        if is_contested(context, waiting_job):
            return Decision(status, wake_after=wake, contested=waiting_job)
        waiting = _pending(context, status, Reason.STARTING, _recreate_text(attempt), wake_after=LOOK_AGAIN_SECONDS)
        return replace(waiting, delete=(waiting_job,))
    reason, text = pending_reason(context.job.spec, attempt.number, context.workers(attempt), context.observed)
    if reason is Reason.UNSCHEDULABLE and batch_for_fewer_workers(context, attempt):
        until = waiting_since(context, attempt) + timedelta(seconds=context.job.spec.policy.shrink_after_seconds)
        wake = min(wake or math.inf, max((until - context.now).total_seconds(), 1))
    return _pending(context, status, reason, text, wake_after=wake)


def _all_train(context: Context, attempt: Attempt, job: ObservedJob) -> bool:
    """Return whether all trainers run: their pods are ready, but for containers that are not the operator's."""
    workers = context.workers(attempt)
    training = [p for p in context.observed.pods_of(attempt.number) if p.trainer_ready and not p.gone]
    unready = sum(not p.ready for p in training)
    return job.ready >= workers or (unready > 0 and len(training) >= workers and job.ready + unready >= workers)


def _pending(
    context: Context,
    status: QLoRAJobStatus,
    reason: Reason,
    text: str,
    *,
    create: tuple[dict[str, Any], ...] = (),
    wake_after: float | None = None,
) -> Decision:
    status = with_condition(context, status, ConditionType.RUNNING, reason, text, is_true=False)
    return Decision(
        status.model_copy(update={"state": "Pending", "reason": reason, "eta": ""}), create, wake_after=wake_after
    )
