"""The history of an attempt as a file that grows: rank 0 writes it, the process of each sink reads it.

The first lines are those of the checkpoint that the attempt resumes from: from the beginning of the file on there is
every step of the run once, up to the newest.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from io import FileIO

FOLDER_ENVIRONMENT = "QLORA_TRACKING"
"""Variable with the folder in which the launcher, rank 0 and the sinks meet. Not set: nothing is tracked."""
JOURNAL_FILE = "history.jsonl"
STEP_METRICS = {
    "loss": "train/loss",
    "learningRate": "train/learning_rate",
    "gradientNorm": "train/grad_norm",
    "epoch": "train/epoch",
    "tokens": "train/tokens",
    "seconds": "train/seconds",
    "dataSeconds": "train/data_seconds",
    "lossScale": "train/loss_scale",
    "skippedSteps": "train/skipped_steps",
}
EVALUATION_METRICS = {"evalLoss": "eval/loss"}
METRICS = {**STEP_METRICS, **EVALUATION_METRICS}
"""Names in the history, and in the tools as transformers' Trainer names them there."""
log = logging.getLogger(__name__)


class Journal:
    """Write lines to the file. A disk that fails ends the journal, not the training."""

    def __init__(self, path: Path) -> None:
        self._file: FileIO | None = None
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            self._give_up(error)

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(b"".join(encoded(line) for line in lines))
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        log.warning("tracking tools get no more steps: the history cannot be written to a file: %s", error)
        self.close()


def tracking_folder() -> Path | None:
    """Return where the launcher, rank 0 and the sinks meet; None where nothing is tracked."""
    folder = os.environ.get(FOLDER_ENVIRONMENT)
    return Path(folder) if folder else None


def journal_of_environment() -> Journal | None:
    """Open the journal that the launcher has named; None where nothing is tracked."""
    folder = tracking_folder()
    return None if folder is None else Journal(folder / JOURNAL_FILE)


@dataclass(frozen=True)
class StepRow:
    """All metrics of one step."""

    step: int
    time: float
    """Seconds since the epoch."""
    metrics: Mapping[str, float]


@dataclass
class RowReader:
    """Read the rows of a journal that grows, and how it ended."""

    path: Path
    exit_code: int | None = None
    """Exit code of the attempt; None until it has ended."""
    adapter: str = ""
    """Published by the attempt."""
    attempts: list[Mapping[str, Any]] = field(default_factory=list)
    _offset: int = 0
    _pending: StepRow | None = None

    def read(self) -> list[StepRow]:
        """Return rows that came since the last call and are complete: a later step has begun, or the run is done.

        An attempt that ends early leaves out its last step, since an evaluation of it may follow in the next attempt.
        """
        rows: list[StepRow] = []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for data in file:
                if not data.endswith(b"\n"):
                    break
                self._offset += len(data)
                rows += self._take(json.loads(data))
        if self.exit_code == 0 and self._pending:
            rows.append(self._pending)
            self._pending = None
        return rows

    def _take(self, line: Mapping[str, Any]) -> Iterable[StepRow]:
        if "exitCode" in line:
            self.exit_code, self.adapter = line["exitCode"], line["adapter"]
        elif "fromStep" in line:
            self.attempts.append(line)
        elif "loss" in line or "evalLoss" in line:
            return self._add(line)
        return ()

    def _add(self, line: Mapping[str, Any]) -> Iterable[StepRow]:
        found = {name: line[key] for key, name in METRICS.items() if line.get(key) is not None}
        before = self._pending
        if before is not None and line["step"] == before.step:
            self._pending = StepRow(before.step, before.time, {**before.metrics, **found})
            return ()
        self._pending = StepRow(line["step"], line["time"], found)
        return () if before is None else (before,)


def end_line(exit_code: int, adapter: str) -> Mapping[str, Any]:
    """Return the last line of a journal."""
    return {"exitCode": exit_code, "adapter": adapter}


def encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"
