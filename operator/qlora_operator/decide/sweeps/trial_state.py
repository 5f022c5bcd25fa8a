"""Observe a trial by its QLoRAJob: its state, and what is needed to change it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from qlora_api.job import QLoRAJob
from qlora_api.status import QLoRAJobStatus
from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.trials import Trial
from qlora_operator.decide.attempts.attempt_history import gpu_seconds, open_attempt
from qlora_sweep.trial_jobs import trial_of_job


@dataclass(frozen=True)
class ObservedTrial:
    """A trial, and what is needed to change its QLoRAJob."""

    trial: Trial
    resource_version: str
    is_suspended: bool
    """Its spec says so."""
    gpus: int
    """That it holds now."""


def observe_trial(number: int, job: QLoRAJob, sweep: QLoRASweepSpec, now: datetime) -> ObservedTrial:
    """Return what a QLoRAJob says of its trial."""
    status = job.status or QLoRAJobStatus()
    attempt = open_attempt(status)
    return ObservedTrial(
        trial_of_job(number, job, sweep, max(status.gpu_seconds, gpu_seconds(status, now))),
        job.metadata.resource_version or "",
        job.spec.suspend,
        attempt.world_size if attempt and attempt.running_time else 0,
    )


def gpu_hours(seconds: float) -> str:
    """Return GPU-hours with three digits behind the point."""
    return f"{seconds / 3600:.3f}".rstrip("0").rstrip(".") or "0"
