"""Errors of reading rows, without text of a row: more people read the status of a job than its rows."""

from __future__ import annotations

import logging
import re
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger(__name__)

MOST_SHOWN = 20
NAME = re.compile(r"[A-Za-z_][\w.:/-]{0,63}")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""In JSON: may be half of a surrogate pair."""
SURROGATE_PROBLEM = "has half of a surrogate pair (\\ud800 to \\udfff), which no text has"


class RowsError(ValueError):
    """Rows that cannot be read; ``str()`` names file, place and problem."""


class MissingColumnError(Exception):
    """A column that a file does not have."""

    def __init__(self, column: str, names: Iterable[str], file: str, hint: str = "") -> None:
        super().__init__(column)
        self.column = column
        self.file = file
        self.hint = hint
        self.known = shown_columns(names)


def unexpected_problem(error: BaseException) -> str:
    """Say what an error is that no row should cause, and log where it came from; its message may quote the row."""
    if isinstance(error, UnicodeEncodeError):
        return SURROGATE_PROBLEM
    frames = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log.error("%s at:\n%s", type(error).__name__, "\n".join(frames))
    return f"{type(error).__name__}, whose place is in the log"


def shown_columns(names: Iterable[str]) -> str:
    """Name the columns there are, unless one is no name: a CSV file without a header begins with a row."""
    known = sorted(names)
    if not known:
        return "none"
    if not all(NAME.fullmatch(name) for name in known):
        return f"{len(known)}, of which some have no proper name (is there a header?)"
    more = f" and {len(known) - MOST_SHOWN} more" if len(known) > MOST_SHOWN else ""
    return ", ".join(known[:MOST_SHOWN]) + more
