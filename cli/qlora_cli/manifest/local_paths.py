"""Find what a source names on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_storage.local_paths import expand_home

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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


def _local_path(source: object) -> Path | None:
    place = source.removeprefix("file://") if isinstance(source, str) else "://"
    return None if "://" in place else expand_home(place)


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except (OSError, ValueError):  # a name too long, a folder that may not be read, a null byte
        return False
