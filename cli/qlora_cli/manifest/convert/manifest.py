"""From a configuration of another tool to the text of a manifest, with what was not converted as its first lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.manifest import crd_schema, init
from qlora_cli.manifest.convert.read import convert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_NONE = object()
_ALWAYS = {"training.learningRate", "training.globalBatchSize", "dataset.maxLength", "quantization.type", "lora.rank"}
"""Shown even where they have the default's value: what people look for first."""
_PLACES = {"model": "model.source", "data": "dataset.train.source", "destination": "output.destination"}


@dataclass(frozen=True)
class Converted:
    """A manifest, and what did not get into it."""

    text: str
    places: tuple[str, str, str]
    """Base, rows and destination."""
    notes: tuple[str, ...]


def manifest_of(
    file: Path, gpus: int, given: Mapping[str, str | None], prompt: Callable[[str], str] | None
) -> Converted:
    """Convert a configuration.

    Args:
        file: the configuration.
        gpus: number of GPUs that it was made for.
        given: answers of the command line, which count more than the configuration.
        prompt: asks for a place that neither names; None where there is nobody to ask.

    Raises:
        ClusterError: the configuration cannot be converted, or a place is missing.
        RefusedError: a value is none that the API takes.

    """
    into = convert(file, gpus)
    known = {name: given.get(name) or str(into.fields.get(path) or "") for name, path in _PLACES.items()}
    answers = init.ask({**given, **known}, prompt)
    chosen: dict[str, object] = {**dict.fromkeys(_PLACES.values()), **into.fields}
    for name, path in _PLACES.items():
        chosen[path] = getattr(answers, name)
    if given.get("format") or "dataset.format" not in chosen:
        chosen["dataset.format"] = answers.format
    chosen = {path: value for path, value in chosen.items() if path in _ALWAYS or value != _default(path)}
    chosen |= init.credentials_of(answers)
    notes = [f"Converted from a configuration of {into.tool}.", *(f"- {note}." for note in into.notes)]
    name = answers.name or init.name_of(answers.data, answers.destination)
    return Converted(
        init.manifest_text(name, chosen, notes), (answers.model, answers.data, answers.destination), tuple(into.notes)
    )


def _default(path: str) -> object:
    found = crd_schema.way_to(f"spec.{path}")
    return found[1][-1].get("default", _NONE) if found else _NONE
