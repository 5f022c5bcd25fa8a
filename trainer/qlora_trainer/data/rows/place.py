"""Position of a row, for error messages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowPlace:
    """``str()`` completes "row …": ``16 (part-1.jsonl, line 6)``."""

    number: int
    """Number of the row in its source, from 1."""
    file: str
    """Path inside the source."""
    within: str
    """Position in the file, such as ``line 6``."""

    def __str__(self) -> str:
        return f"{self.number} ({self.file}, {self.within})"


RowNumber = int | RowPlace
"""A row of a file, or one that has no file, by its number from 1."""
