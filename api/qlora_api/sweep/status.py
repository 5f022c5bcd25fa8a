"""``QLoRASweep.status``, the observed state of a sweep. Only the operator writes it, and decides nothing by it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qlora_api.base import Model, Timestamp
from qlora_api.status import Adapter, Condition, ConditionType, Count, Decimal, Reason, Text, map_by


class TrialCounts(Model):
    """Number of trials by state."""

    total: Count = 0
    """Trials that the sweep will have: the combinations of a grid, or maxTrials."""
    created: Count = 0
    """Trials that exist."""
    running: Count = 0
    """Trials that run, or wait for GPUs."""
    suspended: Count = 0
    """Trials that are suspended, with their checkpoints."""
    succeeded: Count = 0
    """Trials whose adapter is published."""
    failed: Count = 0
    """Trials that ended without an adapter."""


class BestTrial(Model):
    """The best trial that has succeeded."""

    name: Text
    """Name of the trial's QLoRAJob."""
    value: Decimal
    """Value of the objective's metric."""
    parameters: dict[str, Text] = Field({}, max_length=16)
    """Path of each parameter, and its value as text."""
    adapter: Adapter | None = None


class QLoRASweepStatus(Model):
    """Observed state."""

    observed_generation: Count = 0
    """metadata.generation that the operator has acted on."""
    state: ConditionType | Literal["Pending"] = "Pending"
    """The condition that summarizes the sweep's state, for ``kubectl get``."""
    reason: Reason = Reason.PENDING
    """Reason of the state."""
    conditions: list[Condition] = Field([], max_length=16, json_schema_extra=map_by("type"))
    """Conditions, as those of jobs: Running, Suspended, Succeeded, Failed, Finished, Ready, Stalled, Degraded."""
    trials: TrialCounts = TrialCounts()
    finished: Text = ""
    """Number of finished trials and of all trials, as text."""
    best: BestTrial | None = None
    """Best of the trials that have succeeded so far; once the sweep has succeeded, its result."""
    gpu_seconds: Count = 0
    """GPU-seconds of all trials; waiting does not count."""
    gpu_hours: Decimal = "0"
    """GPU-hours of all trials, as text."""
    start_time: Timestamp | None = None
    """Time at which the first trial was created."""
    completion_time: Timestamp | None = None
    """Time at which the sweep succeeded or failed."""
