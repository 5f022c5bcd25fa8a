"""Show how far Prepare is: the stages that its log names, each with its time."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_cli.text import units

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Self

    from rich.console import Console

LINE_END = re.compile(r"[\r\n]")
STAGE = re.compile(r"stage: (.+)$")
ROWS_PROGRESS = re.compile(r"[\d,]+ rows, [\d,]+ of [\d,]+ MB, [\d,.]+ MB/s, about \d+ min left")
"""The last two as in Prepare's log (qlora_trainer.prepare, qlora_trainer.data.collect)."""
LINE_SECONDS = 10.0
"""Between plain lines of one stage."""
TITLE = "Preparing (model and rows are checked before any rank starts)"


@dataclass(frozen=True)
class PrepareProgress:
    """Progress as Prepare's log has it."""

    stage: str = "starting"
    rows: str | None = None
    """Progress over the rows; None if the stage does not report it."""


class PrepareLog:
    """Prepare's log, of which each look reads only what is new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0
        self._progress = PrepareProgress()

    def progress(self) -> PrepareProgress:
        """Return what the log said last, in its whole lines."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                data = file.read()
        except OSError:
            return self._progress
        lines = data[: max(data.rfind(b"\n"), data.rfind(b"\r")) + 1]  # a progress bar ends its lines with \r
        self._read_bytes += len(lines)
        for line in LINE_END.split(lines.decode(errors="replace")):
            if stage := STAGE.search(line):
                self._progress = PrepareProgress(stage[1])
            elif rows := ROWS_PROGRESS.search(line):
                self._progress = replace(self._progress, rows=rows[0])
        return self._progress


class PrepareDisplay:
    """Shows the stage, its time and the time of all: in place on a terminal, else in plain lines."""

    def __init__(self, console: Console, log: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._log = PrepareLog(log)
        self._clock = clock
        self._began = self._stage_began = self._next = clock()
        self._stage = ""
        self._took: dict[str, float] = {}
        self._status = console.status(TITLE) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status:
            self._status.start()
        else:
            self._console.print(TITLE, soft_wrap=True)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._status:
            self._status.stop()

    def tick(self) -> None:
        """Show the stage, if it is another one or it is time."""
        now = self._clock()
        if self._status and now < self._next:
            return
        said = self._log.progress()
        new = said.stage != self._stage
        if new:
            self._finish_stage(now)
            self._stage, self._stage_began = said.stage, now
        if not new and now < self._next:
            return
        self._next = now + (1.0 if self._status else LINE_SECONDS)
        spent = now - self._stage_began
        shown = f"{said.stage}, {units.duration(spent)}" if spent >= 1 else said.stage
        shown = f"{shown}: {said.rows}" if said.rows else shown
        if self._status:
            self._status.update(f"Preparing, {units.duration(now - self._began)} · {shown}")
        else:
            self._console.print(f"Preparing: {shown}", soft_wrap=True)

    def summary(self) -> str:
        """Return how long Prepare took, and each stage of more than a second."""
        now = self._clock()
        self._finish_stage(now)
        stages = ", ".join(f"{stage} {units.duration(took)}" for stage, took in self._took.items() if took >= 1)
        return f"Prepared in {units.duration(now - self._began)}" + (f": {stages}" if stages else "")

    def _finish_stage(self, now: float) -> None:
        if self._stage:
            self._took[self._stage] = self._took.get(self._stage, 0.0) + now - self._stage_began
            self._stage_began = now
