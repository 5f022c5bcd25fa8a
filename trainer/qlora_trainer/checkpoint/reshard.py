"""A ZeRO checkpoint of n ranks for m ranks: partitions put together and cut anew. Stages 1 and 2.

DeepSpeed lays the weights of a parameter group end to end, pads the end so that every rank gets the same number of
elements, and gives rank r the r-th part. Where a weight lies does not depend on the number of ranks, only how long the
padding is; so the parts of any n ranks, one after the other, are the same vector.

What is elementwise in fp32 (weights, moments) is cut exactly. Moments in 8 bits belong to blocks of 256 that begin
anew in each part. Where parts begin at block boundaries before and after, as they do for 1, 2, 4 and 8 ranks of all but
toy adapters, codes and scales are cut exactly too. Elsewhere the moments are dequantized and quantized again, which
moves one by at most half a step of its block: 0.7% of the block's largest first moment, 0.4% of the largest second.
bitsandbytes itself makes that error in every optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from bitsandbytes import functional

Tensors = Mapping[str, torch.Tensor]

BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit optimizers (``optimizer_update_8bit_blockwise``)."""
WEIGHT = "weight"


@dataclass(frozen=True)
class Cut:
    """Position of one rank's part of a group among the parts that were saved."""

    was: int
    """Elements of each saved part."""
    now: int
    """Elements of each new part."""
    start: int
    """First element of this rank's new part, in the whole vector."""
    parts: range
    """Saved parts that this rank needs."""

    @classmethod
    def of(cls, was: int, now: int, rank: int, saved_ranks: int) -> Cut:
        start = rank * now
        return cls(was, now, start, range(min(start // was, saved_ranks), min(-(-(start + now) // was), saved_ranks)))

    @property
    def at_blocks(self) -> bool:
        return self.was % BLOCK == 0 and self.now % BLOCK == 0

    def take(self, parts: list[torch.Tensor], scale: int = 1) -> torch.Tensor:
        """This rank's elements of ``parts``, zeros where only padding was saved.

        Args:
            parts: one vector for each of :attr:`parts`.
            scale: elements of the group for each element of these vectors.

        """
        length = self.now // scale
        if not parts:
            return torch.zeros(length)
        skip = (self.start - self.parts.start * self.was) // scale
        found = torch.cat(parts)[skip : skip + length]
        return torch.cat([found, found.new_zeros(length - len(found))])


def reshard(
    read: Callable[[int], Tensors], saved_ranks: int, rank: int, sizes: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Put together what ``rank`` takes up.

    Args:
        read: the tensors that one of the saved ranks wrote (``state.optimizer_tensors``), by ``place.name``.
        saved_ranks: how many there were.
        rank: of the new ones.
        sizes: place → elements of this rank's new part.

    """
    shards = {0: read(0)}
    result = {name: tensor for name, tensor in shards[0].items() if _place(name) not in sizes}
    for place, now in sizes.items():
        cut = Cut.of(shards[0][f"{place}.{WEIGHT}"].numel(), now, rank, saved_ranks)
        for part in cut.parts:
            if part not in shards:
                shards[part] = read(part)
        parts = [_of(shards[part], place) for part in cut.parts]
        for name, tensor in _cut(cut, parts, like=_of(shards[0], place)).items():
            result[f"{place}.{name}"] = tensor
    return result


def _place(name: str) -> str:
    """``0.0.state1`` belongs to place ``0.0``."""
    return name.rpartition(".")[0]


def _of(shard: Tensors, place: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{place}."): t for name, t in shard.items() if _place(name) == place}


def _cut(cut: Cut, parts: list[dict[str, torch.Tensor]], like: Tensors) -> dict[str, torch.Tensor]:
    """All tensors of one place. What is neither elementwise nor of blocks is the same on all ranks, as Adam's step."""
    result: dict[str, torch.Tensor] = {}
    for name, sample in like.items():
        if name.startswith("absmax"):
            continue
        if sample.numel() != cut.was or name.startswith("qmap"):
            result[name] = sample
        elif sample.dtype == torch.uint8:
            index = name.removeprefix("state")
            codes, scales = _cut_8bit(cut, parts, index, like[f"qmap{index}"])
            result |= {name: codes, f"absmax{index}": scales}
        else:
            result[name] = cut.take([part[name] for part in parts])
    return result


def _cut_8bit(
    cut: Cut, parts: list[dict[str, torch.Tensor]], index: str, code: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of one moment."""
    codes, scales = [p[f"state{index}"] for p in parts], [p[f"absmax{index}"] for p in parts]
    if cut.at_blocks and parts:
        return cut.take(codes), cut.take(scales, BLOCK)
    whole = [
        functional.dequantize_blockwise(c, absmax=s, code=code, blocksize=BLOCK)
        for c, s in zip(codes, scales, strict=True)
    ]
    quantized, state = functional.quantize_blockwise(cut.take(whole), code=code, blocksize=BLOCK)
    return quantized, state.absmax
