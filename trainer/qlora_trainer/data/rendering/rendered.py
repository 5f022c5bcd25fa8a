"""The examples of one row, as texts."""

from __future__ import annotations

from dataclasses import dataclass

Example = list[tuple[str, bool]]
"""Texts to be tokenized apart, and whether they count."""


@dataclass
class Rendered:
    """The examples of one row."""

    examples: list[Example]
    left_out: int = 0
    """Messages of which the template leaves something out."""
    empty: int = 0
    """Messages of the assistant of which nothing is written, so that nothing is learned."""
    tools: bool = False
    """There are tools, and the template writes them."""
