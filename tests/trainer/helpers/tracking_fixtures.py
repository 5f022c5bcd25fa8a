"""Journals as rank 0 writes them, and what TensorBoard's own reader finds in a folder."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from qlora_api import QLoRAJobSpec
from qlora_api.contract import JobRef
from qlora_trainer.tracking.journal import StepRow
from qlora_trainer.tracking.run_facts import RunFacts

if TYPE_CHECKING:
    from pathlib import Path

EVERYTHING = {"scalars": 0, "tensors": 0}
"""For EventAccumulator: keep all events instead of a sample."""


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return step and value of every scalar, by tag, as TensorBoard shows them."""
    accumulator = EventAccumulator(str(folder), size_guidance=EVERYTHING)
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def texts(folder: Path) -> dict[str, str]:
    """Return the newest text of each tag."""
    accumulator = EventAccumulator(str(folder), size_guidance=EVERYTHING)
    accumulator.Reload()
    return {
        tag: accumulator.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in accumulator.Tags()["tensors"]
    }


def step_rows(first: int, last: int, loss: float = 1.0) -> list[StepRow]:
    """Return the rows of steps, both ends included."""
    return [StepRow(step, 1e9 + step, {"train/loss": loss, "train/epoch": step / 4}) for step in range(first, last + 1)]


def facts_of(sink: dict[str, str], attempt: int = 1) -> RunFacts:
    """Return the facts of a small job with one sink."""
    spec = QLoRAJobSpec.model_validate(
        {
            "model": {"source": "hf://org/base@main"},
            "dataset": {"train": {"source": "s3://data/rows.jsonl"}, "format": "Text"},
            "training": {"epochs": 1, "globalBatchSize": 4, "learningRate": "2e-4"},
            "output": {"destination": "s3://adapters/tiny"},
            "tracking": [sink],
        }
    )
    return RunFacts(JobRef(name="tiny", uid="0a1b2c3d-run"), spec, attempt, spec.tracking[0], "spec.tracking[0]")


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the logged rows of an offline run, from its transaction log: LevelDB's format with a header of 7 bytes."""
    (path,) = folder.glob("*.wandb")
    data, offset, parts, rows = path.read_bytes(), 7, [], []
    while offset + 7 <= len(data):
        if LOG_BLOCK - offset % LOG_BLOCK < 7:  # too short for a header
            offset += LOG_BLOCK - offset % LOG_BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        parts.append(data[offset + 7 : offset + 7 + length])
        offset += 7 + length
        if kind in (FULL, LAST):
            record = Record.FromString(b"".join(parts))
            parts = []
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    return rows


LOG_BLOCK = 32768
FULL, LAST = 1, 4
"""Types of LevelDB's records that end an entry."""
