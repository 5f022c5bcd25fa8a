"""Decide what follows the end of an attempt. One pure function serves the operator and ``qlora run``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from qlora_api.batch import BatchSplit
from qlora_api.memory_fallback import Choice, next_smaller
from qlora_api.spec import OnOutOfMemory, PolicySpec
from qlora_api.status import Attempt, Reason

UNCOUNTED_REASONS = frozenset(
    {
        *(Reason.PREEMPTED, Reason.NODE_LOST, Reason.PEER_LOST, Reason.SUSPENDED, Reason.PAUSED),
        Reason.UNSCHEDULABLE,
    }
)
"""Ends that are not the job's doing and do not count against maxRestarts."""
FINAL = frozenset({Reason.USER_ERROR, Reason.NON_FINITE_LOSS, Reason.ADAPTER_REJECTED})
"""Ends that another attempt would only repeat: training is deterministic."""
OUT_OF_MEMORY = frozenset({Reason.OUT_OF_DEVICE_MEMORY, Reason.OUT_OF_HOST_MEMORY})
"""Ends after which something smaller is tried: ``qlora_api.memory_fallback``."""
STUCK = frozenset({Reason.STALLED, Reason.PEER_LOST})
"""Ends in which ranks waited for one that did not go on, or lost sight of it."""
STUCK_ATTEMPTS = 3
"""So many in a row without a step gained end the job, whatever maxRestarts leaves: each holds all GPUs for
stallTimeoutSeconds, and the next would stop at the same place."""
NOTHING_SMALLER = {
    Reason.OUT_OF_DEVICE_MEMORY: "a new job needs a lower spec.dataset.maxLength or spec.lora.rank, another GPU, or, "
    "from rank 256 on, spec.parallelism.zeroStage 2 ('qlora plan' says what fits)",
    Reason.OUT_OF_HOST_MEMORY: "its pods need more memory: the operator's trainer.memory",
}
"""Remedies after the last fallback step. ZeRO and offload are not among them: docs/decisions/0017."""
BACKOFF_SECONDS = (1, 10, 30, 60, 120, 300)


@dataclass(frozen=True)
class FinishJob:
    """The job is over."""

    succeeded: bool
    reason: Reason
    message: str


@dataclass(frozen=True)
class Retry:
    """Start another attempt from the last checkpoint."""

    batch: BatchSplit
    gradient_checkpointing: bool
    wait_seconds: int
    reason: Reason
    counted: bool


def restarts(attempts: Sequence[Attempt]) -> int:
    """Ended attempts that count against ``policy.maxRestarts``."""
    return sum(1 for a in attempts if a.reason not in (*UNCOUNTED_REASONS, *OUT_OF_MEMORY, Reason.COMPLETED, None))


def _did_nothing(attempt: Attempt) -> bool:
    """Return whether an attempt ended without a step; several in a row wait longer each, whatever ended them."""
    return attempt.last_step is None or attempt.last_step == (attempt.first_step or 0)


def stuck(attempts: Sequence[Attempt]) -> int:
    """Count the newest attempts that ended stuck without a step gained over all before them.

    What took an attempt from outside (preemption, a lost node, a suspension) neither counts nor breaks the row.
    """
    count = 0
    for number, attempt in reversed(list(enumerate(attempts))):
        reached = max((a.last_step or 0 for a in attempts[:number]), default=0)
        if (attempt.last_step or 0) > max(reached, attempt.first_step or 0):
            break
        if attempt.reason in STUCK:
            count += 1
        elif attempt.reason not in UNCOUNTED_REASONS:
            break
    return count


def after_attempt(policy: PolicySpec, attempts: Sequence[Attempt]) -> FinishJob | Retry:
    """Decide what follows the newest of ``attempts``, which has ended."""
    last = attempts[-1]
    reason = last.reason or Reason.CRASHED
    again = _again(last)
    if reason is Reason.COMPLETED:
        return FinishJob(True, reason, last.message)
    if reason in FINAL:
        return FinishJob(False, reason, last.message)
    if reason in STUCK and (times := stuck(attempts)) >= STUCK_ATTEMPTS:
        where = f", the last on {last.node}" if last.node and last.node not in last.message else ""
        text = f"{last.message} ({times} attempts in a row ended so{where}, without a step gained)"
        return FinishJob(False, reason, text)
    if reason is Reason.UNSCHEDULABLE:  # it has waited already, for nodes
        return replace(again, reason=reason)
    if reason in UNCOUNTED_REASONS:
        idle = len(list(takewhile(_did_nothing, reversed(attempts))))
        return replace(again, reason=reason, wait_seconds=_back_off(idle) if idle else 0)
    if reason in OUT_OF_MEMORY:
        step = next_smaller(Choice(again.batch, again.gradient_checkpointing))
        if policy.on_out_of_memory is OnOutOfMemory.FAIL:
            return FinishJob(False, reason, f"{last.message} (spec.policy.onOutOfMemory: Fail)")
        if step is None:
            return FinishJob(
                False, reason, f"{last.message}; nothing smaller is left to try: {NOTHING_SMALLER[reason]}"
            )
        chosen = step.choice
        return replace(again, batch=chosen.batch, gradient_checkpointing=chosen.gradient_checkpointing, reason=reason)
    used = restarts(attempts)
    if used > policy.max_restarts:
        return FinishJob(
            False, reason, f"{last.message} (after {policy.max_restarts} restarts: spec.policy.maxRestarts)"
        )
    return replace(again, reason=reason, wait_seconds=_back_off(used), counted=True)


def _again(attempt: Attempt) -> Retry:
    """The same once more, at once."""
    batch = BatchSplit(
        world_size=attempt.world_size,
        micro_batch_size=attempt.micro_batch_size,
        gradient_accumulation_steps=attempt.gradient_accumulation_steps,
    )
    return Retry(batch, attempt.gradient_checkpointing, 0, Reason.PENDING, counted=False)


def _back_off(times: int) -> int:
    return BACKOFF_SECONDS[min(times, len(BACKOFF_SECONDS)) - 1]
