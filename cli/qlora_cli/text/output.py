"""Print results on standard output and everything else on standard error; colours only on a terminal."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from qlora_api.untrusted.printable import is_printable, printable
from qlora_cli.kube.names import API_VERSION, KIND
from qlora_cli.text.choices import OutputFormat
from qlora_cli.text.printable import as_json, is_encodable, one_line, write

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import ConsoleOptions, RenderableType

    from qlora_cli.kube.api_client import Object

STATE_STYLES = {
    "Running": "bold cyan",
    "Succeeded": "green",
    "Failed": "bold red",
    "Pending": "yellow",
    "Suspended": "magenta",
}
LOG_WIDTH = 120
"""Columns for paragraphs where there is no terminal to ask."""


class PrintableConsole(Console):
    """A console on which nothing that is shown can control the terminal; its own styles can."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._depth = threading.local()

    def on_broken_pipe(self) -> None:
        """Leave the end to :class:`~qlora_cli.commands.command_group.CommandGroup`, as for all other output."""
        raise BrokenPipeError

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render, and make the whole printable: parts of it would lose what they were measured to have room for."""
        if getattr(self._depth, "within", False):
            yield from super().render(renderable, options)
            return
        self._depth.within = True
        try:
            segments = list(super().render(renderable, options))
        finally:
            self._depth.within = False
        for segment in segments:
            safe = segment.control or is_printable(segment.text)
            yield segment if safe else Segment(printable(segment.text), segment.style)


def console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is. rich honours FORCE_COLOR and TERM=dumb; NO_COLOR leaves all styles out."""
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"  # rich would still write bold
    made = PrintableConsole(stderr=stderr, markup=False, emoji=False, highlight=False, color_system=colours)
    if not made.is_terminal:
        made.width = LOG_WIDTH
    return made


@dataclass(frozen=True)
class Cell:
    """A text of a table with a style of its own."""

    text: str
    style: str = ""


def state_cell(state: str) -> Cell:
    return Cell(state, STATE_STYLES.get(state, ""))


ROOM = 28
"""Letters of a message that say something."""


def aligned(
    head: Sequence[str],
    rows: Iterable[Sequence[str | Cell]],
    width: int | None = None,
    *,
    right: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> list[Text]:
    """Return rows as lines under a head, in aligned columns with two spaces between; empty columns are left out.

    The last cell of a row that is shorter than the head takes the room of all columns that it has not. With a ``width``
    lines that are longer are cut; before that, and before the last column has less than ``ROOM``, the columns named
    ``spare`` are given up, one after the other.
    """
    styled = [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in rows]
    cells = [[replace(c, text=one_line(c.text)) for c in row] for row in styled]
    full = [row for row in cells if len(row) == len(head)]
    short = [len(row) - 1 for row in cells if len(row) < len(head)]
    kept = [i for i in range(len(head)) if not full or any(row[i].text for row in full) or any(i < n for n in short)]
    widths = {
        i: max([len(head[i]), *(len(row[i].text) for row in cells if i < len(row) - (len(row) < len(head)))])
        for i in kept
    }
    for name in spare:
        least = sum(widths[i] + 2 for i in kept[:-1]) + min(widths[kept[-1]], ROOM)
        if width is None or least <= width:
            break
        if head.index(name) in kept:
            kept.remove(head.index(name))
    columns = [(i, widths[i], head[i] in right) for i in kept]
    lines = [_line([Cell(name, "dim") for name in head], columns)]
    lines += [_line(row, columns, spans=len(row) < len(head)) for row in cells]
    for line in lines:
        line.no_wrap = True
        if width is None:
            line.overflow = "ignore"
        elif len(line) > width:
            line.truncate(width, overflow="ellipsis")
    return lines


def _line(row: Sequence[Cell], columns: Sequence[tuple[int, int, bool]], *, spans: bool = False) -> Text:
    """Return a row as a line; a last cell that ``spans`` takes the room of all columns that the row has not."""
    line = Text()
    for place, width, to_right in columns:
        if spans and place >= len(row) - 1:
            break
        cell = row[place]
        line.append(cell.text.rjust(width) if to_right else cell.text.ljust(width), cell.style or None)
        line.append("  ")
    if spans:
        line.append(row[-1].text, row[-1].style or None)
    line.rstrip()
    return line


def print_table(
    screen: Console,
    head: Sequence[str],
    rows: Iterable[Sequence[str | Cell]],
    *,
    right: Sequence[str] = (),
) -> None:
    """On a terminal no wider than it; elsewhere as wide as it is, for grep and awk."""
    lines = aligned(head, rows, screen.width if screen.is_terminal else None, right=right)
    for line in lines:
        screen.print(line, soft_wrap=True)


# --------------------------------------------------------------------------------------------------------- for programs


JOB = (API_VERSION, KIND)
EVENT = ("v1", "Event")


def write_objects(
    objects: Sequence[Object], form: OutputFormat, *, one: bool = False, kind: tuple[str, str] = JOB
) -> None:
    """JSON, YAML or names. ``one``: the object itself, not a list of one."""
    if form is OutputFormat.NAME:
        write("".join(f"{name_of(o, kind)}\n" for o in objects))
        return
    shown = [_as_kubectl(o, kind) for o in objects]
    write_plain(shown[0] if one and len(shown) == 1 else {"apiVersion": "v1", "kind": "List", "items": shown}, form)


def write_plain(value: Any, form: OutputFormat) -> None:
    """Any plain value, as YAML or JSON."""
    if form is OutputFormat.YAML:
        from qlora_cli.text import kubernetes_yaml  # noqa: PLC0415

        sys.stdout.write(kubernetes_yaml.dump(value, is_encodable))
    else:
        sys.stdout.write(as_json(value) + "\n")


def name_of(body: Object, kind: tuple[str, str] = JOB) -> str:
    """As ``kubectl -o name``; of a local run its folder."""
    if "metadata" not in body:
        return one_line(str(body["folder"]))
    group, slash, _ = str(body.get("apiVersion", kind[0])).partition("/")
    return f"{body.get('kind', kind[1]).lower()}{f'.{group}' if slash else ''}/{body['metadata']['name']}"


def _as_kubectl(body: Object, kind: tuple[str, str]) -> Object:
    """With what a list leaves out, without what is for other programs than the reader's."""
    if "metadata" not in body:  # a local run
        return body
    meta = {name: value for name, value in body["metadata"].items() if name != "managedFields"}
    return {"apiVersion": kind[0], "kind": kind[1], **body, "metadata": meta}


# ----------------------------------------------------------------------------------------------------------- for people


def say_next(*commands: str) -> None:
    """Print the commands to use next on standard error: standard output is for the result."""
    screen = console(stderr=True)
    label = "Next: "
    for command in commands:
        screen.print(Text.assemble((label, "dim"), command), soft_wrap=True)
        label = " " * len(label)


def note(text: str) -> None:
    """A remark beside the result."""
    console(stderr=True).print(Text(text), soft_wrap=True)
