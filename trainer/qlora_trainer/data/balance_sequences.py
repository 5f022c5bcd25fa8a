"""Assign the sequences of a step to ranks with balanced numbers of tokens: a step takes as long as its busiest rank."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qlora_api.batch import BatchSplit


def balance_sequences(lengths: NDArray[np.int64], split: BatchSplit) -> list[list[NDArray[np.int64]]]:
    """Deal the sequences of one step to ranks, and each rank's to its micro-batches.

    Args:
        lengths: [sequences of the step] in tokens; at most a global batch of them.
        split: how many ranks, micro-batches and sequences in each.

    Returns:
        ``[rank][micro-batch]``: indices into ``lengths``, ascending; an empty one is to be filled with a dummy. A
        rank's largest micro-batch comes first, so that those that run at the same time are alike.

    """
    accumulation, micro = split.gradient_accumulation_steps, split.micro_batch_size
    dealt = []
    for share in _spread(lengths, split.world_size, accumulation * micro):
        slots = [share[slot] for slot in _spread(lengths[share], accumulation, micro)]
        dealt.append(sorted(slots, key=lambda slot: -int(lengths[slot].sum())))
    return dealt


def _spread(lengths: NDArray[np.int64], bins: int, most: int) -> list[NDArray[np.int64]]:
    """Put the longest first, each into the bin with the fewest tokens of those not full (LPT; Graham 1969)."""
    held: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, number) for number in range(bins)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        tokens, number = heapq.heappop(heap)
        held[number].append(index)
        if len(held[number]) < most:
            heapq.heappush(heap, (tokens + int(lengths[index]), number))
    return [np.array(sorted(indices), dtype=np.int64) for indices in held]
