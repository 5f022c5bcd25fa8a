"""The batch equation: globalBatchSize = microBatchSize × gradient accumulation × world size."""

from __future__ import annotations

from pydantic import Field

from qlora_api.base import Model
from qlora_api.errors import FieldError
from qlora_api.spec import QLoRAJobSpec

TOKENS_PER_MICRO_BATCH = 8192
"""Enough tokens in a forward pass to hide the dequantization of the base's weights."""


class BatchSplit(Model):
    """Split of one global batch. The product of the three is the global batch size."""

    world_size: int = Field(ge=1)
    """Ranks."""
    micro_batch_size: int = Field(ge=1)
    """Sequences of one rank's forward pass."""
    gradient_accumulation_steps: int = Field(ge=1)
    """Forward passes of a rank for each optimizer step."""

    @property
    def global_batch_size(self) -> int:
        return self.world_size * self.micro_batch_size * self.gradient_accumulation_steps


def split_batch(spec: QLoRAJobSpec, world_size: int) -> BatchSplit:
    """Cut the global batch for ``world_size`` ranks.

    Raises:
        FieldError: the global batch cannot be cut evenly.

    """
    total = spec.training.global_batch_size
    if total % world_size:
        raise FieldError(
            "spec.training.globalBatchSize",
            total,
            f"must be a multiple of the {world_size} ranks; the next ones are {_around(total, world_size)}",
        )
    share = total // world_size
    micro = spec.training.micro_batch_size
    if micro is None:
        most = max(1, TOKENS_PER_MICRO_BATCH // spec.dataset.max_length)
        micro = max(d for d in range(1, share + 1) if share % d == 0 and d <= most)
    if share % micro:
        divisors = ", ".join(str(d) for d in range(1, share + 1) if share % d == 0)
        raise FieldError(
            "spec.training.microBatchSize",
            micro,
            f"must divide each rank's {share} sequences of the global batch of {total}: {divisors}",
        )
    return BatchSplit(world_size=world_size, micro_batch_size=micro, gradient_accumulation_steps=share // micro)


def on_other_ranks(split: BatchSplit, world_size: int) -> BatchSplit | None:
    """The same global batch on another number of ranks, with micro-batches no larger; None where it does not divide."""
    total = split.global_batch_size
    if total % world_size:
        return None
    share = total // world_size
    micro = max(d for d in range(1, split.micro_batch_size + 1) if share % d == 0)
    return BatchSplit(world_size=world_size, micro_batch_size=micro, gradient_accumulation_steps=share // micro)


def halve_micro_batch(split: BatchSplit) -> BatchSplit | None:
    """Return the same global batch with a smaller micro-batch; None when it cannot get smaller."""
    share = split.micro_batch_size * split.gradient_accumulation_steps
    smaller = [d for d in range(1, split.micro_batch_size) if share % d == 0 and d <= split.micro_batch_size // 2]
    if not smaller:
        return None
    return BatchSplit(
        world_size=split.world_size, micro_batch_size=smaller[-1], gradient_accumulation_steps=share // smaller[-1]
    )


def _around(total: int, multiple: int) -> str:
    below = total // multiple * multiple
    return f"{below} and {below + multiple}" if below else str(multiple)
