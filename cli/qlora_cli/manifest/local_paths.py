"""Find what a source names on this machine, and places of a manifest that cannot be meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_api.errors import FieldError
from qlora_storage.local_paths import expand_home, uri_problem, without_password

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PLACES = ("model.source", "dataset.train.source", "dataset.eval.source", "evaluate.folder", "output.destination")


def local_file(source: object) -> Path | None:
    """Return the path of a source that is a file on this machine; None where it is none."""
    path = _local_path(source)
    return path if path and _is(path.is_file) else None


def local_folder(source: object) -> Path | None:
    """Return the path of a source that is a folder on this machine; None where it is none."""
    path = _local_path(source)
    return path if path and _is(path.is_dir) else None


def is_here(path: Path) -> bool:
    """Return whether there is anything at a path; not at one that the operating system refuses."""
    return _is(path.exists)


def places(spec: object) -> Iterator[tuple[str, str]]:
    """Yield each field of a job's spec that names a place, with the place."""
    for field in PLACES:
        value: Any = spec
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str):
            yield f"spec.{field}", value


def place_errors(manifest: object) -> Iterator[FieldError]:
    """Yield an error for each place that cannot be meant as it is written."""
    for field, place in places(manifest.get("spec") if isinstance(manifest, dict) else None):
        if problem := uri_problem(place):
            yield FieldError(field, without_password(place), problem)


def missing_paths(manifest: object) -> Iterator[FieldError]:
    """Yield an error for each local path that is read from and is not there."""
    for field, place in places(manifest.get("spec") if isinstance(manifest, dict) else None):
        path = _local_path(place)
        if field != "spec.output.destination" and path and not is_here(path):
            yield FieldError(field, place, "is not on this machine")


def _local_path(source: object) -> Path | None:
    place = source.removeprefix("file://") if isinstance(source, str) else "://"
    return None if "://" in place else expand_home(place)


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except (OSError, ValueError):  # a name too long, a folder that may not be read, a null byte
        return False
