"""Read the state of a trial from its QLoRAJob. Pure.

Of a trial nothing is known but its QLoRAJob: settings from spec, all else from the status that the operator wrote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from qlora_api.job import QLoRAJob
from qlora_api.status import ConditionType, QLoRAJobStatus, Reason
from qlora_api.sweep.parameters import text_of
from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.trials import Trial, TrialState, trial_name
from qlora_operator.decide.attempts.attempt_history import gpu_seconds, open_attempt
from qlora_operator.decide.conditions import is_condition_true
from qlora_sweep.results import objective_value

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
"""As the name of a trial ends: demo-01 is no trial."""


@dataclass(frozen=True)
class ObservedTrial:
    """A trial, and what is needed to change its QLoRAJob."""

    trial: Trial
    resource_version: str
    is_suspended: bool
    """Its spec says so."""
    gpus: int
    """That it holds now."""


def trial_number(sweep: str, job: str) -> int | None:
    """Return the number of a trial from the name of its job; None: it is no trial's name."""
    text = job.removeprefix(trial_name(sweep, 0).removesuffix("0"))
    return int(text) if text != job and _NUMBER.fullmatch(text) else None


def observe_trial(number: int, job: QLoRAJob, sweep: QLoRASweepSpec, now: datetime) -> ObservedTrial:
    """Return what a QLoRAJob says of its trial."""
    status = job.status or QLoRAJobStatus()
    pause = job.spec.policy.pause_at_step
    last = status.attempts[-1] if status.attempts else None
    state = _state(job, status)
    step = status.progress.step if status.progress else 0
    if pause is not None and state is not TrialState.SUCCEEDED and (last is None or last.reason is not Reason.PAUSED):
        step = min(step, pause - 1)  # it has been stopped without the evaluation by which trials are compared
    failed = next((c.message for c in status.conditions if c.type is ConditionType.FAILED), "")
    trial = Trial(
        number=number,
        name=job.metadata.name,
        parameters={p.path: text_of(job.spec.at(p.path)) for p in sweep.parameters},
        state=state,
        pause_at_step=pause,
        step=step,
        value=_number(objective_value(sweep.objective.metric, status.progress, status.memory)),
        gpu_seconds=max(status.gpu_seconds, gpu_seconds(status, now)),
        message=failed if state is TrialState.FAILED else "",
        adapter=status.adapter if state is TrialState.SUCCEEDED else None,
    )
    attempt = open_attempt(status)
    gpus = attempt.world_size if attempt and attempt.running_time else 0
    return ObservedTrial(trial, job.metadata.resource_version or "", job.spec.suspend, gpus)


def _state(job: QLoRAJob, status: QLoRAJobStatus) -> TrialState:
    if is_condition_true(status.conditions, ConditionType.SUCCEEDED):
        return TrialState.SUCCEEDED
    if is_condition_true(status.conditions, ConditionType.FAILED):
        return TrialState.FAILED
    is_current = status.observed_generation == (job.metadata.generation or 0)
    is_suspended = is_condition_true(status.conditions, ConditionType.SUSPENDED)
    return TrialState.SUSPENDED if is_current and is_suspended else TrialState.RUNNING


def _number(text: str | None) -> str | None:
    """Return a value that is a number; what else is in status was not written by the operator."""
    try:
        float(text or "")
    except ValueError:
        return None
    return text


def gpu_hours(seconds: float) -> str:
    """Return GPU-hours with three digits behind the point."""
    return f"{seconds / 3600:.3f}".rstrip("0").rstrip(".") or "0"
