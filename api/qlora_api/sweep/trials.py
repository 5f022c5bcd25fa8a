"""Trials: the job of each, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import Field

from qlora_api.base import Model
from qlora_api.errors import validate
from qlora_api.spec import QLoRAJobSpec
from qlora_api.status import Adapter, Count, Decimal, Text
from qlora_api.sweep.spec import QLoRASweepSpec

TRIALS_FOLDER = "trials"
"""Below the sweep's destination."""


class TrialState(StrEnum):
    RUNNING = "Running"
    """It has been created, and has neither ended nor been suspended; it may still wait for a GPU."""
    SUSPENDED = "Suspended"
    """It has a checkpoint or has not begun; nothing of it runs."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Trial(Model):
    """One trial of a sweep, as its job tells."""

    number: int = Field(ge=0)
    name: Text
    """Name of its job."""
    parameters: dict[str, Text]
    """Path of each parameter and its value as text."""
    state: TrialState
    pause_at_step: int | None = None
    """Step at which it is suspended to be compared with others; not set: it trains to the end."""
    step: Count = 0
    """Newest step that is known of."""
    value: Decimal | None = None
    """Newest value of the objective's metric."""
    gpu_seconds: Count = 0
    message: Text = ""
    """Cause of its failure."""
    adapter: Adapter | None = None

    @property
    def is_compared(self) -> bool:
        """Tell whether it waits at the step at which it is compared with others."""
        paused = self.pause_at_step is not None and self.step >= self.pause_at_step
        return self.state is TrialState.SUSPENDED and paused


def trial_name(sweep: str, number: int) -> str:
    return f"{sweep}-{number}"


def with_values(spec: QLoRAJobSpec, values: Mapping[str, Any]) -> QLoRAJobSpec:
    """Return a spec with fields set by path.

    Raises:
        qlora_api.errors.ManifestError: the fields do not go together.

    """
    plain = spec.to_json_dict()
    for path, value in values.items():
        group, _, name = path.partition(".")
        plain.setdefault(group, {})[name] = value
    return validate(QLoRAJobSpec, plain)


def trial_spec(sweep: QLoRASweepSpec, name: str, values: Mapping[str, Any]) -> QLoRAJobSpec:
    """Return the spec of a trial's job."""
    spec = with_values(sweep.template.spec, values)
    destination = f"{spec.output.destination.rstrip('/')}/{TRIALS_FOLDER}/{name}"
    return spec.model_copy(update={"output": spec.output.model_copy(update={"destination": destination})})
