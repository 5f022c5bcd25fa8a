"""Record a training step by step: JSON Lines in every checkpoint, published with the adapter, for ``qlora report``.

One line for each attempt, step, evaluation, checkpoint and round of answers, told apart by their fields::

    {"attempt": 1, "fromStep": 0, "time": 1767225600.0, "worldSize": 2, …}
    {"step": 1, "time": …, "loss": 5.1, "learningRate": 0.0002, "gradientNorm": 1.2, "tokens": 512, "seconds": 0.8, …}
    {"step": 1, "evalLoss": 4.9}
    {"step": 1, "attempt": 1, "sections": {"Load": 9.1, …}}
    {"answers": "base", "time": …, "texts": {"prompt": "what it said", …}}          and so of the adapter
    {"tasks": [{"name": "arc_easy", "metric": "acc", "base": "0.61", "adapter": "0.72", …}], "time": …}
    {"receipt": {…}, "predicted": {"gradients": 81788928, …}, "measured": {…}}      last, of what is published

A checkpoint holds the lines up to its step, so that a resumed run has each step once.
"""

from __future__ import annotations

import json
import logging
import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qlora_trainer.tracking.journal import Journal

HISTORY_FILE = "history.jsonl"
PUBLISHED_FILE = "training_history.jsonl"
MOST_STEPS = 20_000
"""Beyond them every second step is left out, then three of four, and so on: 4 MB a checkpoint at most."""
log = logging.getLogger(__name__)


class TrainingHistory:
    """Kept by rank 0; on the others it stays unread.

    Args:
        journal: gets attempts, steps and evaluations as they come, for tracking tools.

    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._lines: list[dict[str, Any]] = []
        self._steps = 0
        self._every = 1
        """Steps that stay: multiples of this, and the newest."""

    def attempt(self, number: int, from_step: int, **more: Any) -> None:
        """Note that an attempt begins."""
        self._note({"attempt": number, "fromStep": from_step, "time": _now(), **more})

    def step(self, number: int, **figures: float) -> None:
        """Note a step and its figures."""
        if self._lines and "loss" in self._lines[-1] and self._lines[-1]["step"] % self._every:
            self._lines.pop()
            self._steps -= 1
        self._note({"step": number, "time": _now(), **{k: _rounded(v) for k, v in figures.items()}})
        self._steps += 1
        while self._steps > MOST_STEPS:
            self._thin_out(number)

    def evaluation(self, step: int, loss: float) -> None:
        """Note the loss of the evaluation rows."""
        self._note({"step": step, "time": _now(), "evalLoss": _rounded(loss)})

    def sections(self, attempt: int, step: int, seconds: Mapping[str, float]) -> None:
        """Note how the attempt's time was spent up to now."""
        self._lines.append({"step": step, "attempt": attempt, "sections": {k: round(v, 3) for k, v in seconds.items()}})

    def answers(self, who: str, texts: Mapping[str, str]) -> None:
        """Note what ``base`` or ``adapter`` said to each prompt; what it said before is forgotten."""
        self._lines = [line for line in self._lines if line.get("answers") != who]
        self._lines.append({"answers": who, "time": _now(), "texts": dict(texts)})

    def tasks(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Note what base and adapter reached in the tasks of spec.evaluate; what was noted before is forgotten."""
        self._lines = [line for line in self._lines if "tasks" not in line]
        if results:
            self._lines.append({"tasks": [dict(result) for result in results], "time": _now()})

    def end(self, receipt: Mapping[str, Any], predicted: Mapping[str, int], measured: Mapping[str, int]) -> None:
        """Note what else a report tells; of the rows only numbers: not everybody may read them."""
        numbers = {name: value for name, value in receipt.items() if name != "samples"}
        self._lines.append({"receipt": numbers, "predicted": dict(predicted), "measured": dict(measured)})

    def to_bytes(self) -> bytes:
        return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in self._lines).encode()

    def resume(self, data: bytes) -> None:
        """Go on from a checkpoint's lines. Damaged ones are no reason to stop a training."""
        try:
            self._lines = [json.loads(line) for line in data.decode().splitlines()]
        except ValueError as error:
            log.warning("the history of earlier attempts cannot be read (%s); it begins anew", error)
        self._steps = sum("loss" in line for line in self._lines)
        if self._journal is not None:
            self._journal.write(self._lines)

    def _note(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        if self._journal is not None:
            self._journal.write([line])

    def _thin_out(self, newest: int) -> None:
        self._every *= 2
        stay = (
            line
            for line in self._lines
            if "loss" not in line or not line["step"] % self._every or line["step"] == newest
        )
        self._lines = list(stay)
        self._steps = sum("loss" in line for line in self._lines)


def _now() -> float:
    return round(time.time(), 3)


def _rounded(value: float) -> float | None:
    """Six digits say all that a curve shows; JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
