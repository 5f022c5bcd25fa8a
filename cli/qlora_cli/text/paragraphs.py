"""Lay out text in lines that never cut a path, a URI or a command: a word that is too long has a line of its own."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, ConsoleOptions

HELD = "\u00a0"
"""A space at which no line ends."""
LEAST_ROOM = 20


def folded(text: str, room: int) -> list[str]:
    """Return the lines of a text, at most ``room`` characters each unless a single word is longer."""
    lines = textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False)
    return [line.replace(HELD, " ") for line in lines] or [""]


def held(text: str) -> str:
    """Return a text that :func:`folded` keeps on one line."""
    return text.replace(" ", HELD)


@dataclass(frozen=True)
class LabelledLines:
    """Labels and values in two columns; rows without a value are left out. Print it with ``crop=False``."""

    rows: Sequence[tuple[str, str]]
    label_width: int | None = None
    """None: as wide as the longest label needs."""

    def lines(self, width: int) -> Iterator[Text]:
        """Yield the lines for a screen of ``width`` characters."""
        rows = [(label, value) for label, value in self.rows if value]
        indent = self.label_width or max((len(label) for label, _ in rows), default=0) + 3
        for label, value in rows:
            for number, part in enumerate(folded(value, max(width - indent, LEAST_ROOM))):
                shown = (f"{label if number == 0 else '':<{indent}}", "dim")
                yield Text.assemble(shown, part, no_wrap=True, overflow="ignore")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from self.lines(options.max_width)


@dataclass(frozen=True)
class Paragraph:
    """A text of several paragraphs, folded between words. Print it with ``crop=False``."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for paragraph in self.text.splitlines():
            for line in folded(paragraph, options.max_width):
                yield Text(line, no_wrap=True, overflow="ignore")
