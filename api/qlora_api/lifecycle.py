"""What follows the end of an attempt. One pure function serves the operator and ``qlora run``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from qlora_api.batch import BatchSplit, halve_micro_batch
from qlora_api.spec import OnOutOfMemory, PolicySpec
from qlora_api.status import Attempt, Reason

FREE_OF_CHARGE = frozenset(
    {Reason.PREEMPTED, Reason.NODE_LOST, Reason.PEER_LOST, Reason.SUSPENDED, Reason.UNSCHEDULABLE}
)
"""Ends that are not the job's doing and do not count against maxRestarts."""
FINAL = frozenset({Reason.USER_ERROR, Reason.NON_FINITE_LOSS, Reason.ADAPTER_REJECTED})
"""Ends that another attempt would only repeat: training is deterministic."""
BACKOFF_SECONDS = (1, 10, 30, 60, 120, 300)


@dataclass(frozen=True)
class Finish:
    """The job is over."""

    succeeded: bool
    reason: Reason
    message: str


@dataclass(frozen=True)
class Retry:
    """Start another attempt from the last checkpoint."""

    batch: BatchSplit
    wait_seconds: int
    reason: Reason
    counted: bool


def restarts(attempts: Sequence[Attempt]) -> int:
    """Ended attempts that count against ``policy.maxRestarts``."""
    return sum(1 for a in attempts if a.reason not in (*FREE_OF_CHARGE, Reason.COMPLETED, None))


def _did_nothing(attempt: Attempt) -> bool:
    """Whether an attempt ended without a step; several in a row wait longer each, whatever ended them."""
    return attempt.last_step is None or attempt.last_step == (attempt.first_step or 0)


def after_attempt(policy: PolicySpec, attempts: Sequence[Attempt]) -> Finish | Retry:
    """Decide what follows the newest of ``attempts``, which has ended."""
    last = attempts[-1]
    reason = last.reason or Reason.CRASHED
    batch = BatchSplit(
        world_size=last.world_size,
        micro_batch_size=last.micro_batch_size,
        gradient_accumulation_steps=last.gradient_accumulation_steps,
    )
    if reason is Reason.COMPLETED:
        return Finish(True, reason, last.message)
    if reason in FINAL:
        return Finish(False, reason, last.message)
    if reason is Reason.UNSCHEDULABLE:  # it has waited already, for nodes
        return Retry(batch, 0, reason, counted=False)
    if reason in FREE_OF_CHARGE:
        idle = len(list(takewhile(_did_nothing, reversed(attempts))))
        return Retry(batch, BACKOFF_SECONDS[min(idle, len(BACKOFF_SECONDS)) - 1] if idle else 0, reason, counted=False)
    if reason is Reason.OUT_OF_DEVICE_MEMORY:
        smaller = halve_micro_batch(batch) if policy.on_out_of_memory is OnOutOfMemory.RECOVER else None
        if smaller is None:
            return Finish(False, reason, last.message)
        return Retry(smaller, 0, reason, counted=False)
    used = restarts(attempts)
    if used > policy.max_restarts:
        return Finish(False, reason, f"{last.message} (after {policy.max_restarts} restarts: spec.policy.maxRestarts)")
    return Retry(batch, BACKOFF_SECONDS[min(used, len(BACKOFF_SECONDS)) - 1], reason, counted=True)
