"""Input and output of one decision."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from qlora_api.job import QLoRAJob
from qlora_api.spec import Gang
from qlora_api.status import Attempt, QLoRAJobStatus
from qlora_operator.config import OperatorConfig
from qlora_operator.state.observed import Observed, ObservedJob


@dataclass(frozen=True)
class Note:
    """An Event to post."""

    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """Actions of one decision, in this order: create, delete, write status, post events."""

    status: QLoRAJobStatus
    create: tuple[dict[str, Any], ...] = ()
    delete: tuple[ObservedJob, ...] = ()
    notes: tuple[Note, ...] = ()
    wake_after: float | None = None
    """Seconds until the next decision, should nothing happen before."""
    watch_progress: bool = False
    """Rank 0 trains, or Prepare works: ask it how far it is."""
    delete_self: bool = False
    contested: ObservedJob | None = None
    """A Job that another release of the operator made, and that this one would make otherwise."""


@dataclass(frozen=True)
class Context:
    """Values that stay the same over one decision."""

    job: QLoRAJob
    observed: Observed
    config: OperatorConfig
    gang: Gang
    """Gang scheduling that the cluster uses; never Auto."""

    @property
    def now(self) -> datetime:
        return self.observed.now

    @property
    def world_size(self) -> int:
        """Ranks when all workers are there."""
        return self.job.spec.parallelism.workers * self.job.spec.parallelism.gpus_per_worker

    def workers(self, attempt: Attempt) -> int:
        """Pods of an attempt: all, or with minWorkers fewer."""
        return attempt.world_size // self.job.spec.parallelism.gpus_per_worker
