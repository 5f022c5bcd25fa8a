"""The steps of a run, from what the trainer left: a history in checkpoints and beside the adapter, and logs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qlora_storage.local_paths import open_regular, read_regular

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

CHECKPOINT_FILE, PUBLISHED_FILE = "history.jsonl", "training_history.jsonl"
"""As ``qlora_trainer.reporting.training_history`` names them; a test holds them together."""
MARKER = "COMPLETE.json"
"""File that only a complete checkpoint has."""
LARGEST = 2**53
"""Largest whole number that is read as a step."""
_STEP = re.compile(
    r"INFO step (?P<step>\d{1,15})/\d+ loss (?P<loss>\S+) lr (?P<rate>\S+) norm (?P<norm>\S+)"
    r" tokens/s (?P<speed>\S+)"
)
_EVALUATION = re.compile(r"INFO step (?P<step>\d{1,15}) eval loss (?P<loss>\S+)")


@dataclass(frozen=True)
class StepFacts:
    """One optimizer step. None: not known, or not finite."""

    step: int
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    data_seconds: float | None = None


@dataclass(frozen=True)
class AttemptFacts:
    """Facts about an attempt, recorded when it began."""

    number: int
    from_step: int
    time: float
    world_size: int | None = None
    micro_batch_size: int | None = None
    accumulation: int | None = None
    checkpointing: bool | None = None
    compute_type: str | None = None
    device: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions, and what else is known of the machine."""


@dataclass(frozen=True)
class MergedHistory:
    """All that is known, each step once."""

    steps: dict[int, StepFacts] = field(default_factory=dict)
    evaluations: dict[int, float] = field(default_factory=dict)
    attempts: dict[int, AttemptFacts] = field(default_factory=dict)
    sections: dict[int, dict[str, float]] = field(default_factory=dict)
    """Seconds of rank 0 by attempt and section, up to its newest checkpoint."""
    answers: dict[str, dict[str, str]] = field(default_factory=dict)
    """By who gave them, ``base`` or ``adapter``, and prompt."""
    tasks: list[dict[str, Any]] = field(default_factory=list)
    """Results of the tasks of spec.evaluate."""
    end: dict[str, Any] = field(default_factory=dict)
    """Summary of a published run: counts of rows, and memory predicted and measured."""

    @property
    def section_seconds(self) -> dict[str, float]:
        """Over all attempts."""
        total: dict[str, float] = {}
        for seconds in self.sections.values():
            for section, value in seconds.items():
                total[section] = total.get(section, 0.0) + value
        return total


def of_run(folder: Path, adapter: Path | None = None) -> MergedHistory:
    """The history of a local run: its adapter's, else its newest whole checkpoint's and the logs of what came after."""
    if adapter is not None and (adapter / PUBLISHED_FILE).exists():
        return of_file(adapter / PUBLISHED_FILE)
    saved = [_vouched_for(p) for p in sorted((folder / "checkpoints").glob(f"step-*/{MARKER}"))]
    found = of_file(next((path for path in reversed(saved) if path.exists()), None))
    return with_logs(found, sorted(folder.glob("attempt-*/log.txt"), key=_number))


def _vouched_for(marker: Path) -> Path:
    """Return where the history of a checkpoint is: among the files of the attempt that its marker speaks of."""
    try:
        attempt = json.loads(read_regular(marker))["checkpoint"]["attempt"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        attempt = None
    inside = marker.parent if attempt is None else marker.parent / f"attempt-{attempt}"
    return inside / CHECKPOINT_FILE


def of_file(path: Path | None) -> MergedHistory:
    """Read a file of the trainer's; nothing where there is none."""
    return parse(_lines(path)) if path is not None and path.exists() else MergedHistory()


def _lines(path: Path) -> Iterator[str]:
    with open_regular(path) as file:
        for line in file:
            yield line.decode(errors="replace")


def parse(lines: Iterable[str]) -> MergedHistory:
    """Lines as ``qlora_trainer.reporting.training_history`` writes them. What cannot be read is left out."""
    found = MergedHistory()
    for text in lines:
        try:
            line = json.loads(text)
            _take(found, line)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            continue
    return found


def _take(found: MergedHistory, line: dict[str, Any]) -> None:
    if "receipt" in line:
        found.end.update(line)
    elif "answers" in line:
        found.answers[str(line["answers"])] = {str(prompt): str(text) for prompt, text in line["texts"].items()}
    elif "tasks" in line:
        found.tasks[:] = [dict(result) for result in line["tasks"]]
    elif "sections" in line:
        found.sections[_whole(line["attempt"])] = {str(k): _finite(v) or 0.0 for k, v in line["sections"].items()}
    elif "fromStep" in line:
        found.attempts[_whole(line["attempt"])] = AttemptFacts(
            number=_whole(line["attempt"]),
            from_step=_whole(line["fromStep"]),
            time=float(line["time"]),
            world_size=line.get("worldSize"),
            micro_batch_size=line.get("microBatchSize"),
            accumulation=line.get("gradientAccumulationSteps"),
            checkpointing=line.get("gradientCheckpointing"),
            compute_type=_text(line.get("computeType")),
            device=_text(line.get("device")),
            environment={str(name): str(value) for name, value in line.get("environment", {}).items()},
        )
    elif "evalLoss" in line:
        if (loss := _finite(line["evalLoss"])) is not None:
            found.evaluations[_whole(line["step"])] = loss
    elif "loss" in line:
        tokens, seconds = _finite(line.get("tokens")), _finite(line.get("seconds"))
        found.steps[_whole(line["step"])] = StepFacts(
            step=_whole(line["step"]),
            loss=_finite(line["loss"]),
            learning_rate=_finite(line.get("learningRate")),
            gradient_norm=_finite(line.get("gradientNorm")),
            tokens_per_second=tokens / seconds if tokens and seconds else None,
            seconds=seconds,
            data_seconds=_finite(line.get("dataSeconds")),
        )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def with_logs(known: MergedHistory, logs: Iterable[Path]) -> MergedHistory:
    """Return the history with the steps that only logs tell of: those since the last checkpoint."""
    steps, evaluations = dict(known.steps), dict(known.evaluations)
    newest = max(known.steps, default=0)
    for log in logs:
        for line in _lines(log):
            if match := _STEP.search(line):
                number = _whole(match["step"])
                if number > newest:
                    steps[number] = _from_log(match)
            elif (match := _EVALUATION.search(line)) and (loss := _finite(match["loss"])) is not None:
                evaluations.setdefault(_whole(match["step"]), loss)
    return replace(known, steps=dict(sorted(steps.items())), evaluations=dict(sorted(evaluations.items())))


def _from_log(match: re.Match[str]) -> StepFacts:
    return StepFacts(
        step=_whole(match["step"]),
        loss=_finite(match["loss"]),
        learning_rate=_finite(match["rate"]),
        gradient_norm=_finite(match["norm"]),
        tokens_per_second=_finite(match["speed"]),
    )


def _finite(value: str | float | None) -> float | None:
    """Return a number; None where there is none, or one that is not finite."""
    try:
        number = math.nan if value is None else float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _whole(value: str | float) -> int:
    """Return a whole number that a chart has room for.

    Raises:
        ValueError: it is larger.

    """
    number = int(value)
    if abs(number) > LARGEST:
        raise ValueError(value)
    return number


def _number(log: Path) -> int:
    digits = log.parent.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0
