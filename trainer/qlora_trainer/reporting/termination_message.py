"""The termination message: one for each worker, and of several that want to write it the one that tells most.

What follows a failure is not its cause: the first word stands, unless it only says that somebody else went away.
The file is written in place, since in a pod it is a mount of its own that nothing can be renamed onto.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from qlora_api.contract import ExitCode, TerminationMessage

if TYPE_CHECKING:
    from pathlib import Path

TELLS_NOTHING = frozenset({ExitCode.DONE, ExitCode.PEER_LOST})
"""Codes of words that any failure replaces: what Prepare found, and that a peer went away."""


def read(path: Path) -> TerminationMessage | None:
    """Return the termination message; None if there is none, or only a part of one."""
    try:
        return TerminationMessage.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write(path: Path, termination: TerminationMessage) -> None:
    """Put a word in the place of any other."""
    path.write_bytes(termination.to_bytes())


def write_unless_told(path: Path, termination: TerminationMessage) -> None:
    """Put a failure's word there, unless one that tells more is there already."""
    there = read(path)
    if there is None or (there.exit_code in TELLS_NOTHING and termination.exit_code != ExitCode.PEER_LOST):
        write(path, termination)


def clear(path: Path) -> None:
    """Leave nothing for a later reader to take for this process's word."""
    if path.exists():
        path.write_bytes(b"")
