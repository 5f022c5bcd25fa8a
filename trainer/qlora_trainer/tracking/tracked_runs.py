"""Files beside the journal in which the processes of the sinks report on their runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_api.status import TrackedRun

if TYPE_CHECKING:
    from pathlib import Path


def read_runs(folder: Path) -> list[TrackedRun]:
    """Return what the processes of the sinks last said, in the order of spec.tracking."""
    return [TrackedRun.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("sink-*.json"))]


def write_run(folder: Path, number: int, run: TrackedRun) -> None:
    """Replace what one sink said."""
    partial = folder / f"sink-{number}.partial"
    partial.write_text(run.model_dump_json(by_alias=True))
    partial.replace(folder / f"sink-{number}.json")
