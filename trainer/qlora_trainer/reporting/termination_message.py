"""Read and write the termination message of a worker; of several processes, the one that knows the cause writes it.

The first failure is usually the cause of later ones. So its message is kept, unless it only says that a peer is lost.
The file is written in place, because in a pod it is a mount of its own, onto which no file can be renamed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from qlora_api.contract import ExitCode, TerminationMessage

if TYPE_CHECKING:
    from pathlib import Path

REPLACEABLE_EXIT_CODES = frozenset({ExitCode.DONE, ExitCode.PEER_LOST})
"""Exit codes whose message any failure replaces: the result of Prepare, and the loss of a peer."""


def read(path: Path) -> TerminationMessage | None:
    """Return the termination message; None if there is none, or only a part of one."""
    try:
        return TerminationMessage.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write(path: Path, termination: TerminationMessage) -> None:
    """Write a message, and replace any other."""
    path.write_bytes(termination.to_bytes())


def write_unless_told(path: Path, termination: TerminationMessage) -> None:
    """Write the message of a failure, unless an earlier one names a cause."""
    there = read(path)
    if there is None or (there.exit_code in REPLACEABLE_EXIT_CODES and termination.exit_code != ExitCode.PEER_LOST):
        write(path, termination)


def clear(path: Path) -> None:
    """Delete the content, so that nobody takes it for the message of this process."""
    if path.exists():
        path.write_bytes(b"")
