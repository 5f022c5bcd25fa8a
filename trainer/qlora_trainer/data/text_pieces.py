"""The texts that are tokenized apart, and whether one says anything."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

_UNSEEN = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})
"""Categories of spaces, controls, and characters without width."""


class Piece(NamedTuple):
    """A text, all of whose tokens count for the loss or none."""

    text: str
    counts: bool


def is_blank(text: str) -> bool:
    """Return whether a text has nothing that is seen: who learns to write it learns silence."""
    return all(unicodedata.category(character) in _UNSEEN for character in text)
