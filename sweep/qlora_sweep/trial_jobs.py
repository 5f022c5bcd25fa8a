"""Read the state of a trial from its QLoRAJob.

On a cluster nothing is known of a trial but its QLoRAJob: settings from spec, all else from the status that the
operator wrote.
"""

from __future__ import annotations

import re

from qlora_api.job import QLoRAJob
from qlora_api.status import ConditionType, QLoRAJobStatus, Reason
from qlora_api.sweep.parameters import text_of
from qlora_api.sweep.spec import ObjectiveMetric, QLoRASweepSpec
from qlora_api.sweep.trials import Trial, TrialState, trial_name
from qlora_sweep.results import objective_value

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
"""As the name of a trial ends: demo-01 is no trial."""


def trial_number(sweep: str, job: str) -> int | None:
    """Return the number of a trial from the name of its job; None: it is no trial's name."""
    text = job.removeprefix(trial_name(sweep, 0).removesuffix("0"))
    return int(text) if text != job and _NUMBER.fullmatch(text) else None


def trial_of_job(number: int, job: QLoRAJob, sweep: QLoRASweepSpec, gpu_seconds: int) -> Trial:
    """Return what a QLoRAJob says of its trial."""
    status = job.status or QLoRAJobStatus()
    pause = job.spec.policy.pause_at_step
    last = status.attempts[-1] if status.attempts else None
    state = _state(job, status)
    step = status.progress.step if status.progress else 0
    if pause is not None and state is not TrialState.SUCCEEDED and (last is None or last.reason is not Reason.PAUSED):
        step = min(step, pause - 1)  # it has been stopped without the evaluation by which trials are compared
    failed = next((c.message for c in status.conditions if c.type is ConditionType.FAILED), "")
    return Trial(
        number=number,
        name=job.metadata.name,
        parameters={p.path: text_of(job.spec.at(p.path)) for p in sweep.parameters},
        state=state,
        pause_at_step=pause,
        step=step,
        value=_number(objective_value(sweep.objective.metric, status.progress, status.memory)),
        gpu_seconds=gpu_seconds,
        message=failed if state is TrialState.FAILED else "",
        adapter=status.adapter if state is TrialState.SUCCEEDED else None,
    )


def values_by_step(job: QLoRAJob, metric: ObjectiveMetric) -> dict[int, float]:
    """Return the objective at each step at which an attempt of a trial ended; a loss alone depends on the step."""
    status = job.status or QLoRAJobStatus()
    found = {}
    for attempt in status.attempts:
        value = {
            ObjectiveMetric.EVAL_LOSS: attempt.best_eval_loss,
            ObjectiveMetric.TRAINING_LOSS: attempt.loss,
        }.get(metric, objective_value(metric, status.progress, status.memory))
        if attempt.end_time and attempt.last_step is not None and (text := _number(value)) is not None:
            found[attempt.last_step] = float(text)
    return found


def _state(job: QLoRAJob, status: QLoRAJobStatus) -> TrialState:
    true = {condition.type for condition in status.conditions if condition.status == "True"}
    if ConditionType.SUCCEEDED in true:
        return TrialState.SUCCEEDED
    if ConditionType.FAILED in true:
        return TrialState.FAILED
    is_current = status.observed_generation == (job.metadata.generation or 0)
    return TrialState.SUSPENDED if is_current and ConditionType.SUSPENDED in true else TrialState.RUNNING


def _number(text: str | None) -> str | None:
    """Return a value that is a number; what else is in status was not written by the operator."""
    try:
        float(text or "")
    except ValueError:
        return None
    return text
