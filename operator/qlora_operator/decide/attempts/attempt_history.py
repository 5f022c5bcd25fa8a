"""The attempts, figures and GPU time in a status: what was, as values. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from qlora_api.batch import BatchSplit
from qlora_api.lifecycle import restarts
from qlora_api.status import MAX_ATTEMPTS, Attempt, Memory, Progress, QLoRAJobStatus, TrackedRun
from qlora_operator.decide.attempts.attempt_outcome import Ending
from qlora_operator.decide.conditions import memory_in_words, time_in_words
from qlora_operator.decide.decision import Context
from qlora_operator.state.observed import JobState, ObservedJob
from qlora_operator.state.reports import known_components

REPORTED_FIELDS = ("stage", "progress", "memory", "eta", "peakMemory", "stopSeconds", "graceSeconds", "tracking")
"""Fields of status that pods report. Only the decision on the time to stop depends on them."""


def open_attempt(status: QLoRAJobStatus) -> Attempt | None:
    """The newest attempt, where it has not ended."""
    return status.attempts[-1] if status.attempts and status.attempts[-1].end_time is None else None


def with_attempt(status: QLoRAJobStatus, attempt: Attempt) -> QLoRAJobStatus:
    """Add an attempt, or put it in the place of the one with its number; keep no more than MAX_ATTEMPTS."""
    attempts = [*(a for a in status.attempts if a.number != attempt.number), attempt]
    earlier = status.earlier_gpu_seconds
    while len(attempts) > MAX_ATTEMPTS:
        free = next((a for a in attempts[:-1] if restarts([a]) == 0), attempts[0])
        attempts.remove(free)
        earlier += _held([free], free.end_time or free.start_time)
    start = status.start_time or attempt.start_time
    update = {
        "attempts": attempts,
        "restarts": restarts(attempts),
        "total_restarts": attempt.number - 1,
        "start_time": start,
        "earlier_gpu_seconds": earlier,
    }
    return status.model_copy(update=update)


def with_job_uids(status: QLoRAJobStatus, jobs: Iterable[ObservedJob]) -> QLoRAJobStatus:
    """Record the Jobs of attempts: pods that outlive their Job are known by its UID."""
    uids = {job.attempt: job.uid for job in jobs}
    attempts = [
        a.model_copy(update={"job_uid": uids[a.number]}) if a.end_time is None and a.number in uids else a
        for a in status.attempts
    ]
    return status.model_copy(update={"attempts": attempts})


def with_clock_stopped(context: Context, status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Put down what was used, once the last pod is gone of an attempt that a queue took back; it may be admitted again.

    Its Job stays, so the attempt goes on: what it waits from now on is no time that it runs.
    """
    attempt = open_attempt(status)
    if attempt is None or attempt.running_time is None:
        return status
    job = context.observed.jobs.get(attempt.number)
    if job is None or job.state is not JobState.SUSPENDED:
        return status
    if any(not pod.ended for pod in context.observed.pods_of(attempt.number)):
        return status
    earlier = status.earlier_gpu_seconds + _held([attempt], context.now)
    status = with_attempt(status, attempt.model_copy(update={"running_time": None, "node": ""}))
    status = status.model_copy(update={"earlier_gpu_seconds": earlier})
    return status.model_copy(update={"gpu_seconds": gpu_seconds(status, context.now)})


def measured(context: Context, status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Progress and memory as rank 0 last told."""
    report, attempt = context.observed.report, open_attempt(status)
    if report is None or attempt is None or report.attempt != attempt.number:
        return status
    progress = Progress(**{name: getattr(report, name) for name in Progress.model_fields})
    update = {"first_step": report.first_step, "last_step": report.step, "compute_type": report.compute_type}
    status = with_attempt(status, attempt.model_copy(update=update))
    return _with_tracking(_with_measures(status, progress, report.memory), report.tracking)


def with_termination_message(status: QLoRAJobStatus, ending: Ending) -> QLoRAJobStatus:
    termination = ending.termination_message
    if termination is None:
        return status
    status = _with_measures(status, termination.progress or status.progress, termination.memory)
    status = _with_tracking(status, termination.tracking)
    if status.attempts and termination.compute_type is not None:
        status = with_attempt(status, status.attempts[-1].model_copy(update={"compute_type": termination.compute_type}))
    update = {"adapter": termination.adapter or status.adapter, "tasks": termination.tasks or status.tasks, "eta": ""}
    return status.model_copy(update=update)


def with_closed_attempt(context: Context, status: QLoRAJobStatus, ended: Attempt, ending: Ending) -> QLoRAJobStatus:
    """Close an attempt in status, with what it used and said."""
    status = with_attempt(status, ended)
    status = status.model_copy(update={"gpu_seconds": gpu_seconds(status, context.now)})
    return with_termination_message(status, ending)


def _with_tracking(status: QLoRAJobStatus, runs: Sequence[TrackedRun]) -> QLoRAJobStatus:
    """Take in where tracking tools have the run; what was known before stays where a tool has not answered yet."""
    known = {run.type: run for run in status.tracking}
    known |= {run.type: run.model_copy(update={"url": run.url or known.get(run.type, run).url}) for run in runs}
    return status.model_copy(update={"tracking": list(known.values())})


def _with_measures(status: QLoRAJobStatus, progress: Progress | None, memory: Memory | None) -> QLoRAJobStatus:
    before = status.memory or Memory()
    reported = known_components(memory.predicted if memory else {})
    # Another batch than before, for which the memory measured so far does not count.
    afresh = bool(reported) and reported != before.predicted
    merged = {} if afresh else known_components(before.measured)
    predicted = reported or before.predicted
    for component, size in known_components(memory.measured if memory else {}).items():
        merged[component] = max(size, merged.get(component, 0))
    return status.model_copy(
        update={
            "progress": progress,
            "memory": Memory(predicted=predicted, measured=merged) if merged or predicted else None,
            "peak_memory": memory_in_words(merged),
            "eta": time_in_words(progress.eta_seconds if progress else None),
        }
    )


def budget_left(context: Context, status: QLoRAJobStatus) -> float | None:
    """GPU-seconds until the ranks have to be told to stop, which takes some, too; None without a budget."""
    hours = context.job.spec.policy.budget_gpu_hours
    attempt = open_attempt(status)
    stop = (status.stop_seconds or 0) * (attempt.world_size if attempt else context.world_size)
    return None if hours is None else float(hours) * 3600 - stop - gpu_seconds(status, context.now)


def gpu_seconds(status: QLoRAJobStatus, now: datetime) -> int:
    """Time of all GPUs over all attempts, from when their pods were ready."""
    return status.earlier_gpu_seconds + _held(status.attempts, now)


def _held(attempts: Sequence[Attempt], now: datetime) -> int:
    held = ((a.world_size, (a.end_time or now) - a.running_time) for a in attempts if a.running_time)
    return round(sum(ranks * time.total_seconds() for ranks, time in held))


def batch_of(attempt: Attempt) -> BatchSplit:
    return BatchSplit(
        world_size=attempt.world_size,
        micro_batch_size=attempt.micro_batch_size,
        gradient_accumulation_steps=attempt.gradient_accumulation_steps,
    )


def differ_in_figures(before: QLoRAJobStatus, after: QLoRAJobStatus) -> bool:
    """Return whether only stage, progress, memory and their messages differ: these wait for the next write."""
    return without_figures(before) == without_figures(after)


def without_figures(status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Return a status without stage, progress, memory and the messages about them."""
    attempts = [a.model_copy(update={"first_step": None, "last_step": None}) for a in status.attempts]
    conditions = [c.model_copy(update={"message": "", "observed_generation": 0}) for c in status.conditions]
    update: dict[str, Any] = {"progress": None, "memory": None, "peak_memory": "", "eta": "", "gpu_seconds": 0}
    update |= {"stage": None, "grace_seconds": None, "stop_seconds": None}
    update["tracking"] = [TrackedRun(type=run.type, message="behind") for run in status.tracking if run.message]
    return status.model_copy(update={**update, "attempts": attempts, "conditions": conditions})
