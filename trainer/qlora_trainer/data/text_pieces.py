"""The text that is tokenized in one go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Piece:
    """A text and the parts of it that count for the loss."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Character ranges [start, stop), in order, not empty."""
    templated: bool = False
    """Written by a chat template, with begin and end tokens of its own."""

    @classmethod
    def all(cls, text: str) -> Self:
        return cls(text, ((0, len(text)),))

    @classmethod
    def none(cls, text: str) -> Self:
        return cls(text, ())

    @property
    def partial(self) -> bool:
        """Some characters count and some do not, so that the tokens' offsets are needed."""
        return bool(self.spans) and self.spans != ((0, len(self.text)),)
