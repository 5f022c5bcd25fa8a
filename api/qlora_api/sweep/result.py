"""``sweep.json`` below a sweep's destination: where its adapters come from, and which is best."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from qlora_api.base import Model, Timestamp
from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.trials import Trial

RESULT_FILE = "sweep.json"
RESULT_SCHEMA: Final = "qlora.dev/sweep/v1"


class SweepResult(Model):
    """Written once, when the sweep is over."""

    schema_version: Literal["qlora.dev/sweep/v1"] = Field(RESULT_SCHEMA, alias="schema")
    sweep: str
    uid: str
    created: Timestamp
    finished: Timestamp
    best: Trial
    """The best trial, with the address of its adapter and the hash of that adapter's manifest."""
    trials: list[Trial]
    spec: QLoRASweepSpec

    def to_bytes(self) -> bytes:
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=2).encode() + b"\n"
