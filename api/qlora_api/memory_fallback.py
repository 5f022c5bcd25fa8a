"""The way down after running out of device memory: from one choice to the next smaller one. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from qlora_api.batch import BatchSplit, halve_micro_batch
from qlora_api.spec import Offload

WORTHWHILE = 0.98
"""A step that changes how ranks share the state must need at most this share of the bytes before."""


@dataclass(frozen=True)
class Choice:
    """Settings that an attempt starts with, as far as they can be made smaller."""

    batch: BatchSplit
    gradient_checkpointing: bool
    zero_stage: int = 0
    offload: Offload = Offload.NONE


@dataclass(frozen=True)
class FallbackStep:
    """The next smaller choice."""

    choice: Choice
    change: str
    """Description of the difference."""
    resumes: bool
    """True if a checkpoint of the previous choice can be resumed: not if ZeRO partitions the optimizer state anew."""


def next_smaller(choice: Choice, needed: Callable[[Choice], int] | None = None) -> FallbackStep | None:
    """Return the next fallback step; None after the last. The global batch stays.

    Halve the micro-batch, then recompute activations, then share the state among ranks (ZeRO 1 to 3) or move the
    optimizer's to host memory. Sharing brings DeepSpeed's buckets, one or two of the adapter's size, which seldom
    leaves a gain: it is taken only where ``needed`` finds that it helps.

    Args:
        choice: of the attempt that ran out.
        needed: bytes that a choice needs on one GPU; None: the last steps are left out.

    """
    if (batch := halve_micro_batch(choice.batch)) is not None:
        return FallbackStep(replace(choice, batch=batch), f"micro-batches of {batch.micro_batch_size}", resumes=True)
    if not choice.gradient_checkpointing:
        return FallbackStep(replace(choice, gradient_checkpointing=True), "gradient checkpointing", resumes=True)
    if needed is None:
        return None
    most = WORTHWHILE * needed(choice)
    for step in _sharing(choice):
        if needed(step.choice) <= most:
            return step
    return None


def _sharing(choice: Choice) -> Iterator[FallbackStep]:
    """More sharing first, host memory last: it is slower."""
    for stage in range(choice.zero_stage + 1, 4 if choice.batch.world_size > 1 else 1):
        yield FallbackStep(replace(choice, zero_stage=stage), f"ZeRO stage {stage}", resumes=False)
    if choice.offload is Offload.NONE:
        stage = max(1, choice.zero_stage)
        moved = replace(choice, zero_stage=stage, offload=Offload.OPTIMIZER)
        yield FallbackStep(moved, f"the optimizer's state in host memory, ZeRO stage {stage}", resumes=False)
