"""Question to and answer of ``python -m qlora_sweep``."""

from __future__ import annotations

from typing import Any

from qlora_api.base import Model
from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.trials import Trial


class DrawRequest(Model):
    spec: QLoRASweepSpec
    trials: list[Trial]


class DrawnTrials(Model):
    values: dict[int, dict[str, Any]]
    """Number of each trial that is to be created, and the value of each parameter by path."""
