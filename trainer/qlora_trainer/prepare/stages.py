"""Stages of Prepare that run the code of a model's class, within bounds: where a process ended is in a file.

What is in a config.json decides how much that code does, up to a million layers. The system ends the process that goes
beyond a stage's bounds; the file tells the parent, and the next process, within which stage that was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_trainer.bounds import Bounds, bounded
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from qlora_api.contract import TrainerConfig


class Stage(StrEnum):
    """A stage of Prepare with bounds of its own."""

    MODEL = "model"
    """The base is built without weights."""
    TRIAL = "trial"
    """A toy of the base is trained."""


BOUNDS = {Stage.MODEL: Bounds(seconds=600.0), Stage.TRIAL: Bounds(seconds=60.0, memory_bytes=2 << 30)}
"""Bounds of each stage. A large base is built in seconds; a toy takes one or two seconds and 200 MiB."""


@contextmanager
def bounded_stage(config: TrainerConfig, stage: Stage) -> Iterator[None]:
    """Do a stage within its bounds.

    Raises:
        UserError: building the base takes too much memory.

    """
    file = _file(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(stage)
    try:
        with bounded(BOUNDS[stage]):
            yield
    except MemoryError:
        if stage is not Stage.MODEL:
            raise
        raise model_error(config, "memory") from None
    finally:
        file.unlink(missing_ok=True)


def stage_of_end(config: TrainerConfig) -> Stage | None:
    """Return the stage within which the last process of this job ended; None where it ended outside of them."""
    file = _file(config)
    return Stage(file.read_text()) if file.exists() else None


def model_error(config: TrainerConfig, what: str) -> UserError:
    """Return the error of a base that takes too much of something to be built."""
    return UserError(
        "spec.model.source",
        config.spec.model.source,
        f"takes too much {what} to be built, without its weights even: look at the number of layers and experts in its "
        "config.json, or choose another base",
    )


def _file(config: TrainerConfig) -> Path:
    return Path(config.cache_dir) / f".stage-{config.job.uid}"
