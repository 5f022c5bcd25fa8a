"""Read what pods say of themselves: progress reports and termination messages. Pure.

Whoever runs a pod decides on what it says. Nothing gets into status, or into a decision, that the types of status would
not take; figures that are none are left out, and a message without them is as good a message.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import Any

from pydantic import ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import from_json

from qlora_api.contract import ProgressReport, TerminationMessage
from qlora_api.spec import SinkType
from qlora_api.status import Memory, MemoryComponent, PrepareResult, Progress, TaskResult, TrackedRun
from qlora_api.untrusted.printable import printable

MOST = 2**53 - 1
"""Largest count that is taken: what JSON holds exactly, and an int64 of the API server's in any case."""
MOST_STAGE_SECONDS = 10**9
"""Longest time in a stage that is taken, some thirty years."""
LONGEST_STAGE = 128
"""Characters of a stage's name that are kept."""
MOST_TASKS = 8
"""As many as spec.evaluate has."""
COMPONENTS = frozenset(component.value for component in MemoryComponent)
_READ_FIELDS = frozenset(
    {
        *("job", "attempt", "section", "stage", "stageSeconds", "memory", "tracking"),
        *("firstStep", "longestStepSeconds", "longestSaveSeconds"),
        *(to_camel(name) for name in Progress.model_fields),
    }
)
"""Fields of a progress report that the operator acts on or writes into status. The rest is not kept."""
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_FIGURES = ("loss", "eval_loss", "best_eval_loss", "learning_rate", "tokens_per_second")


class ReportError(ValueError):
    """A pod said something that is no report."""


def read_report(text: bytes) -> ProgressReport:
    """Read the answer of ``GET /progress``.

    Raises:
        ReportError: it is none.

    """
    found = _mapping(text)
    found["memory"] = _memory(found.get("memory"))
    found["tracking"] = _tracking(found.get("tracking"))
    stage = found.get("stage")
    found["stage"] = stage[:LONGEST_STAGE] or None if isinstance(stage, str) else None
    try:
        report = ProgressReport.model_validate({name: value for name, value in found.items() if name in _READ_FIELDS})
    except ValidationError as error:
        raise ReportError(f"{error.error_count()} fields of a progress report cannot be read") from None
    counts = (
        report.attempt,
        report.first_step,
        report.tokens,
        report.longest_step_seconds,
        report.longest_save_seconds,
    )
    if not all(0 <= count <= MOST for count in counts) or not 0 <= report.stage_seconds <= MOST_STAGE_SECONDS:
        raise ReportError("a count of a progress report is out of bounds")
    _check_counts(report)
    return report.model_copy(update=_figures(report))


def read_termination_message(text: str) -> TerminationMessage | None:
    """Read a termination message without the figures in it that are none; None where it is no message."""
    try:
        found = _mapping(text.encode(errors="replace"))
        figures = {"progress": _progress(found.pop("progress", None)), "memory": found.pop("memory", None)}
        prepared = _prepared(found.pop("prepared", None))
        found["tracking"] = _tracking(found.get("tracking"))
        found["tasks"] = _tasks(found.get("tasks"))
        message = TerminationMessage.model_validate(found)
    except (ReportError, ValidationError):
        return None
    memory = None if figures["memory"] is None else Memory.model_validate(_memory(figures["memory"]))
    return message.model_copy(update={"progress": figures["progress"], "memory": memory, "prepared": prepared})


def is_number(text: str) -> bool:
    """Return whether a decimal string is a finite number."""
    return bool(_DECIMAL.fullmatch(text)) and math.isfinite(float(text))


def known_components(sizes: Any) -> dict[str, int]:
    """Return the sizes whose names are components and whose values are possible."""
    if not isinstance(sizes, dict):
        return {}
    return {
        name: size for name, size in sizes.items() if name in COMPONENTS and type(size) is int and 0 <= size <= MOST
    }


def _mapping(text: bytes) -> dict[str, Any]:
    try:
        found = from_json(text, allow_inf_nan=False)  # of a bounded depth
    except ValueError as error:
        raise ReportError(f"it is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ReportError("it is no JSON object")
    cleaned: dict[str, Any] = _printable(found)
    return cleaned


def _printable(value: Any) -> Any:
    """Return a value of JSON in which all texts are fit to be shown."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(each) for each in value]
    return {name: _printable(each) for name, each in value.items()} if isinstance(value, dict) else value


def _memory(found: Any) -> dict[str, dict[str, int]]:
    found = found if isinstance(found, dict) else {}
    return {name: known_components(found.get(name)) for name in ("predicted", "measured")}


def _tracking(found: Any) -> list[TrackedRun]:
    """Return the runs in tracking tools that can be read, the first of each type."""
    runs: dict[SinkType, TrackedRun] = {}
    for each in found if isinstance(found, list) else ():
        with suppress(ValidationError):
            run = TrackedRun.model_validate(each)
            runs.setdefault(run.type, run)
    return list(runs.values())


def _tasks(found: Any) -> list[TaskResult]:
    """Return the results that can be read and whose values are numbers, the first of each task."""
    results: dict[str, TaskResult] = {}
    for each in found[:MOST_TASKS] if isinstance(found, list) else ():
        with suppress(ValidationError):
            result = TaskResult.model_validate(each)
            values = (result.base, result.adapter, result.standard_error)
            if result.examples <= MOST and all(value is None or is_number(value) for value in values):
                results.setdefault(result.name, result)
    return list(results.values())


def _progress(found: Any) -> Progress | None:
    try:
        progress = Progress.model_validate(found) if isinstance(found, dict) else None
        if progress is not None:
            _check_counts(progress)
    except (ReportError, ValidationError):
        return None
    return progress and progress.model_copy(update=_figures(progress))


def _prepared(found: Any) -> PrepareResult | None:
    """Parse Prepare's result; None where any of it is not what Prepare says, for a plan is made of it."""
    if not isinstance(found, dict):
        return None
    try:
        result = PrepareResult.model_validate({**found, "memory": known_components(found.get("memory"))})
    except ValidationError:
        return None
    counts = (value for _, value in result if isinstance(value, int))
    hours = result.expected_gpu_hours
    readable = all(count <= MOST for count in counts) and (hours is None or is_number(hours))
    return result if readable and is_number(result.seconds) and is_number(result.packing_efficiency) else None


def _check_counts(progress: Progress) -> None:
    if any(count > MOST for count in (progress.step, progress.total_steps, progress.eta_seconds or 0)):
        raise ReportError("a count of progress is out of bounds")


def _figures(progress: Progress) -> dict[str, str | None]:
    """Changes that leave out the figures that are no numbers."""
    left_out: dict[str, str | None] = {
        name: None for name in _FIGURES if (text := getattr(progress, name)) is not None and not is_number(text)
    }
    return left_out if is_number(progress.epoch) else {**left_out, "epoch": "0"}
