"""Errors of reading rows, without text of a row: more people read the status of a job than its rows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_SHOWN = 20
NAME = re.compile(r"[A-Za-z_][\w.:/-]{0,63}")


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


def shown_columns(names: Iterable[str]) -> str:
    """Name the columns there are, unless one is no name: a CSV file without a header begins with a row."""
    known = sorted(names)
    if not known:
        return "none"
    if not all(NAME.fullmatch(name) for name in known):
        return f"{len(known)}, of which some have no proper name (is there a header?)"
    more = f" and {len(known) - MOST_SHOWN} more" if len(known) > MOST_SHOWN else ""
    return ", ".join(known[:MOST_SHOWN]) + more
