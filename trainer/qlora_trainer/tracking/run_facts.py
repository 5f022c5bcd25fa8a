"""A tracking tool as the rest of the trainer sees it, and what every tool is told of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from qlora_api.contract import JobRef, TrainerConfig
    from qlora_api.spec import QLoRAJobSpec, TrackingSink
    from qlora_trainer.tracking.journal import StepRow

TRACKED_GROUPS = ("model", "dataset", "quantization", "lora", "training", "parallelism", "output")
"""Groups of the spec that may not change while the job runs, and so stay true of all steps."""
ATTEMPT_FIELDS = ("worldSize", "microBatchSize", "gradientAccumulationSteps", "computeType", "device")
"""Fields of an attempt's line in the history."""


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run that every tool is told."""

    job: JobRef
    spec: QLoRAJobSpec
    attempt: int
    sink: TrackingSink
    field: str
    """Path of the sink in the manifest, for messages."""

    @classmethod
    def of(cls, config: TrainerConfig, number: int) -> RunFacts:
        return cls(config.job, config.spec, config.attempt, config.spec.tracking[number], f"spec.tracking[{number}]")

    @property
    def folder_name(self) -> str:
        """Name of the run where names must be unique."""
        return f"{self.job.name}-{self.job.uid[:8]}"

    @property
    def parameters(self) -> dict[str, str]:
        """Fields of the spec by their dotted names."""
        plain = self.spec.to_json_dict()
        pairs = (pair for group in TRACKED_GROUPS for pair in _flat(group, plain[group]))
        return {path: value for path, value in pairs if value and _is_told(path)}


class Sink(Protocol):
    """A tool, connected. Every call may raise; then the sink is closed, and another one starts from the first row."""

    def __init__(self, facts: RunFacts) -> None:
        """Connect, and find the run in the tool or create it.

        Raises:
            UserError: the tool refuses.
            StorageError: the tool cannot be reached.

        """

    @staticmethod
    def check(facts: RunFacts) -> None:
        """Check that the tool takes runs, without creating one.

        Raises:
            UserError: it refuses.
            StorageError: it cannot be reached.

        """

    @property
    def url(self) -> str:
        """URL or folder of the run."""

    def write(self, rows: Sequence[StepRow]) -> None:
        """Store rows, in the order of their steps; those that the tool has already are left out."""

    def finish(self, attempts: Sequence[Mapping[str, Any]], exit_code: int, adapter: str, history: Path) -> None:
        """Store how the attempt ended, and the artifacts of a run that is done."""

    def close(self) -> None:
        """Free what is open."""


def newest_attempt(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what tools are told of the newest attempt."""
    line = attempts[-1] if attempts else {}
    return {name: line[name] for name in ATTEMPT_FIELDS if name in line}


def _flat(path: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(f"{path}.{name}", inner)
    elif isinstance(value, list):
        yield path, ", ".join(str(each) for each in value)
    else:
        yield path, str(value).lower() if isinstance(value, bool) else str(value)


def _is_told(path: str) -> bool:
    """Leave out what may change while the job runs, and names of Secrets."""
    return not path.endswith(".credentials") and path not in ("output.merge", "output.allowWorseEval")
