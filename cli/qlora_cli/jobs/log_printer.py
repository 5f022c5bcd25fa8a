"""Lines of logs on a terminal or in a pipe."""

from __future__ import annotations

import re
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from qlora_cli.jobs.job_view import read_run
from qlora_cli.jobs.logs import prefix
from qlora_cli.kube.errors import ClusterError
from qlora_cli.local.processes import in_use
from qlora_cli.text.output import console
from qlora_cli.text.printable import write
from qlora_storage.local_paths import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qlora_cli.jobs.logs import Line

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta")
LOOK_SECONDS = 0.5
"""Between two looks at a local log that is followed."""
MOST_AT_ONCE = 1 << 20
"""Bytes of a log that are read before they are printed."""
_SINCE = re.compile(r"(\d+)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_since(text: str | None) -> int | None:
    """Seconds of ``30s``, ``5m``, ``2h``, ``1d``.

    Raises:
        ClusterError: it is none of these.

    """
    if text is None:
        return None
    found = _SINCE.fullmatch(text)
    if found is None or not int(found[1]):
        raise ClusterError(f'--since: "{text}" must be a number with a unit: 30s, 5m, 2h or 1d')
    return int(found[1]) * _SECONDS[found[2]]


class Printer:
    """Each line behind its rank, in the rank's colour on a terminal. Flushed: somebody follows."""

    def __init__(self, *, timestamps: bool) -> None:
        self._screen = console()
        self._timestamps = timestamps
        self._attempt: int | None = None

    def line(self, line: Line) -> None:
        if self._attempt not in (None, line.attempt):
            self._write("", f"── attempt {line.attempt} ──", "dim")
        self._attempt = line.attempt
        colour = COLOURS[(line.worker if line.rank is None else line.rank) % len(COLOURS)]
        label = f"{prefix(line):<8} │ "
        stamp = f"{line.stamp} " if self._timestamps else ""
        self._write(label, f"{stamp}{line.text}", colour)

    def _write(self, label: str, text: str, style: str) -> None:
        if not self._screen.is_terminal:
            write(f"{label}{text}\n")
            return
        body = Text(text) if label else Text(text, style=style)
        self._screen.print(Text.assemble((label, style), body), soft_wrap=True)


def print_local(folder: Path, attempt: int | None, *, prepare: bool, tail: int | None, follow: bool = False) -> None:
    """The log of a local run's attempt; default: the newest. ``follow``: until its process has ended.

    Raises:
        ClusterError: there is no such run, or no such log.

    """
    record = read_run(folder)
    numbers = [a.get("number") for a in record.get("attempts") or ()]
    step = "prepare" if prepare or not numbers else f"attempt-{attempt or numbers[-1]}"
    path = folder / step / "log.txt"
    try:
        log = open_regular(path)
    except OSError:
        there = ", ".join(sorted(p.parent.name for p in folder.glob("*/log.txt"))) or "none"
        raise ClusterError(f"{path}: is not there; logs are there of {there}") from None
    with log:
        if tail is not None:
            _put(deque(log, maxlen=tail))
        while lines := log.readlines(MOST_AT_ONCE):
            _put(lines)
        while follow:
            lives = in_use(folder)  # asked before reading: what it wrote last is read
            _put(log.readlines())
            if not lives:
                return
            time.sleep(LOOK_SECONDS)


def _put(lines: Iterable[bytes]) -> None:
    write(b"".join(lines).decode(errors="replace"))
