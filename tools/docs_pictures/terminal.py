"""Commands as one sees them on a terminal: run on one, and what they wrote as a small SVG without fonts of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from signal import SIGINT
from threading import Thread

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

WIDTH = 120
WAIT_SECONDS = 60
THEME = TerminalTheme(
    (21, 25, 31),
    (220, 225, 232),
    [
        *((74, 82, 94), (255, 120, 112), (79, 209, 150), (227, 192, 75)),
        *((110, 168, 255), (229, 138, 201), (90, 205, 220), (220, 225, 232)),
    ],
)
"""Light on dark, wherever it is shown."""
_FORM = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px}}
{styles}
</style>
<defs>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""
_LAST_SCREEN = "\x1b[?1049l"
"""Control sequence with which a full-screen program leaves the alternate screen."""
_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]")
"""All that a terminal is told but colours."""


class Session:
    """A command on a terminal of its own, until it ends or is interrupted.

    Args:
        command: what is run.
        environment: laid over this process'.
        height: lines of the terminal.

    """

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str], height: int = 30) -> None:
        own, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, WIDTH, 0, 0))
        plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**plain, "TERM": "xterm-256color", **environment},
        )
        os.close(theirs)
        self._own = own
        self._said = bytearray()
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                more = os.read(self._own, 1 << 16)
            except OSError:  # nobody has the other side any more
                return
            if not more:
                return
            self._said += more

    def interrupt(self) -> str:
        """Return what it leaves on the terminal when it is told to stop by Ctrl-C."""
        self._process.send_signal(SIGINT)
        return self.end()

    def end(self) -> str:
        """Return what it leaves on the terminal once it is over."""
        self._process.wait(WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)
        os.close(self._own)
        text = self._said.decode(errors="replace").rpartition(_LAST_SCREEN)[2]
        return _MOVES.sub("", text).replace("\r", "").strip("\n")


def picture(commands: Sequence[tuple[str, str]]) -> str:
    """Commands and what they said, one after the other."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor")
    for number, (command, said) in enumerate(commands):
        if number:
            console.print()
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        for line in said.splitlines():
            console.print(Text.from_ansi(line), soft_wrap=True)
    drawn = console.export_svg(title="", theme=THEME, code_format=_FORM, unique_id="t")
    return "".join(line.rstrip() + "\n" for line in drawn.splitlines() if line.strip())
