"""The texts that are tokenized apart."""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """A text, all of whose tokens count for the loss or none."""

    text: str
    counts: bool
