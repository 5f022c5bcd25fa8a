"""Bytes that training the adapter adds: gradients, optimizer state, ZeRO's copies and buffers.

Rajbhandari et al. 2020 (ZeRO), section 5, as DeepSpeed 0.19.8 and ``qlora_trainer.engine.deepspeed_engine`` have it:
what learns is fp32 and DeepSpeed is told nothing of 16-bit types.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from qlora_api.spec import Offload, Optimizer, ParallelismSpec
from qlora_memory.weights import AdapterShape

BLOCK = 256
"""Elements that share an absmax in 8-bit optimizer states. Dettmers et al. 2022 (8-bit optimizers), section 2.2;
bitsandbytes.optim.optimizer.Optimizer2State.init_state."""
SMALLEST_8BIT = 4096
"""Smaller tensors keep 32-bit states: bitsandbytes' ``min_8bit_size``."""
SMALLEST_PAGED = 100_000
"""Smaller states are never paged: bitsandbytes.optim.optimizer.Optimizer8bit.get_state_buffer."""
CODES = 2 * 256 * 4
"""fp32 tables of the signed and unsigned 8-bit values: shared by all tensors in memory, with each in a checkpoint."""
BUCKET = 500_000_000
"""Most elements of ``reduce_bucket_size``, which is that of the adapter (``qlora_trainer.engine.deepspeed_engine``):
under ZeRO it is allocated whole (deepspeed.runtime.zero.stage_1_and_2.setup_buckets, stage3.__init__)."""
ALIGNMENT = 2
"""Elements that a flat group is padded to for each rank: DeepSpeed's ``nccl_start_alignment_factor``."""
_EIGHT_BIT = (Optimizer.PAGED_ADAMW_8BIT, Optimizer.ADAMW_8BIT)
_PAGED = (Optimizer.PAGED_ADAMW_8BIT, Optimizer.PAGED_ADAMW_32BIT)


@dataclass(frozen=True)
class TrainingState:
    """Memory of one rank besides weights and activations, in bytes."""

    gradients: int
    """Between the last backward pass and the update: 4·P, or this rank's share of it from ZeRO 1 on."""
    accumulating: int
    """Between micro-batches: 4·P without ZeRO and in stage 1, which partitions only at the end; in stage 2 those of all
    tensors that this rank's partition touches."""
    optimizer: int
    """First and second moments, and under ZeRO 1 and 2 the rank's fp32 copy of its partition."""
    paged: int
    """The part of ``optimizer`` that may move to host memory under pressure. CUDA manages it: PyTorch's own count does
    not show it."""
    backward_buffers: int
    """Buffers of collectives during the backward pass."""
    step_buffers: int
    """Buffers of collectives and copies during the optimizer step, when activations are freed."""
    host: int
    """In host memory, with offload."""


def training_state(
    adapter: AdapterShape, optimizer: Optimizer, parallelism: ParallelismSpec, world_size: int, *, cuda: bool = True
) -> TrainingState:
    """State of one rank.

    Args:
        adapter: what learns, P elements.
        optimizer: as the job names it; with offload AdamW in host memory takes its place.
        parallelism: ZeRO stage and offload.
        world_size: ranks W.
        cuda: overlapping communication, and with it a second bucket, is switched on for GPUs alone.

    """
    stage, total = parallelism.zero_stage, adapter.parameters
    offloaded = parallelism.offload is Offload.OPTIMIZER
    updated = partitions(adapter, stage, world_size)
    chosen = Optimizer.ADAMW if offloaded else optimizer
    states = moment_bytes(updated, chosen)
    copies = 4 * sum(updated) if stage else 0
    share = copies if stage else 4 * total
    bucket = 4 * min(total, BUCKET)
    buckets = {0: 0, 1: bucket * (1 + cuda), 2: bucket * (1 + cuda), 3: bucket}[stage]
    flat = 4 * total if world_size > 1 and stage == 0 else share
    return TrainingState(
        gradients=0 if offloaded else share,
        accumulating=_accumulating(adapter, stage, world_size, share) if stage < 2 or not offloaded else 0,
        optimizer=0 if offloaded else states + copies,
        paged=0 if offloaded else paged_bytes(updated, chosen),
        backward_buffers=buckets,
        step_buffers=flat if world_size > 1 or stage else 0,
        host=states + 2 * copies if offloaded else 0,
    )


def partitions(adapter: AdapterShape, stage: int, world_size: int) -> tuple[int, ...]:
    """Elements of each tensor that the optimizer of one rank updates.

    Without ZeRO the adapter's own. Under ZeRO the rank's share of two flat groups, matrices and vectors
    (``qlora_trainer.engine.optim.parameter_groups``): ⌈n / 2W⌉·2 in stages 1 and 2, Σ ⌈nᵢ / W⌉ in stage 3.
    """
    if stage == 0:
        return adapter.tensors
    groups = [group for group in (adapter.matrices, adapter.vectors) if group]
    if stage == 3:
        return tuple(sum(-(-n // world_size) for n in group) for group in groups)
    padded = ALIGNMENT * world_size
    return tuple(-(-sum(group) // padded) * ALIGNMENT for group in groups)


def _accumulating(adapter: AdapterShape, stage: int, world_size: int, share: int) -> int:
    """Gradients between micro-batches on the rank that has most: stage 2 keeps a tensor whole that a border divides.

    deepspeed.runtime.zero.stage_1_and_2.get_all_grad_tensors.
    """
    if stage < 2:
        return 4 * adapter.parameters
    if stage == 3:
        return share
    total = 0
    for group in (adapter.matrices, adapter.vectors):
        size = -(-sum(group) // (ALIGNMENT * world_size)) * ALIGNMENT
        ends = list(accumulate(group))
        total += max(
            (
                sum(n for n, end in zip(group, ends, strict=True) if end > rank * size and end - n < (rank + 1) * size)
                for rank in range(world_size)
            ),
            default=0,
        )
    return 4 * total


def moment_bytes(tensors: tuple[int, ...], optimizer: Optimizer) -> int:
    """Return the bytes of AdamW's two moments for tensors of these sizes.

    32 bit: 8·n. 8 bit, block-wise: 2·n + 2·4·⌈n/256⌉ for tensors of 4,096 elements and more, 8·n below.
    """
    if optimizer not in _EIGHT_BIT:
        steps = 4 * len(tensors) if optimizer is Optimizer.ADAMW else 0  # torch keeps the step as a tensor
        return 8 * sum(tensors) + steps
    small = sum(8 * n for n in tensors if n < SMALLEST_8BIT)
    large = [n for n in tensors if n >= SMALLEST_8BIT]
    return small + sum(2 * n + 8 * math.ceil(n / BLOCK) for n in large) + (CODES if large else 0)


def paged_bytes(tensors: tuple[int, ...], optimizer: Optimizer) -> int:
    """Return the part of the moments in memory that CUDA may page out."""
    if optimizer not in _PAGED:
        return 0
    width = 2 if optimizer in _EIGHT_BIT else 8
    return sum(width * n for n in tensors if n >= SMALLEST_PAGED)


def checkpoint_bytes(adapter: AdapterShape, optimizer: Optimizer, parallelism: ParallelismSpec, world_size: int) -> int:
    """Return bytes of one checkpoint over all ranks: the adapter once, the moments, under ZeRO the partitions' weights.

    ``qlora_trainer.checkpoint.engine_state``; file headers and step numbers, some kilobytes, are left out.
    """
    stage = parallelism.zero_stage
    chosen = Optimizer.ADAMW if parallelism.offload is Offload.OPTIMIZER else optimizer
    updated = partitions(adapter, stage, world_size)
    moments = moment_bytes(updated, chosen)
    if chosen in _EIGHT_BIT:
        moments += CODES * max(0, sum(n >= SMALLEST_8BIT for n in updated) - 1)
    return adapter.bytes + (world_size * (moments + 4 * sum(updated)) if stage else moments)
