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
class PartitionSlice:
    """Position of one rank's new partition of a parameter group among the saved partitions."""

    saved_size: int
    """Elements of each saved partition."""
    new_size: int
    """Elements of each new partition."""
    start: int
    """First element of this rank's new partition, in the whole vector."""
    parts: range
    """Saved partitions that this rank needs."""

    @classmethod
    def of(cls, saved_size: int, new_size: int, rank: int, saved_ranks: int) -> PartitionSlice:
        start = rank * new_size
        first, end = start // saved_size, -(-(start + new_size) // saved_size)
        return cls(saved_size, new_size, start, range(min(first, saved_ranks), min(end, saved_ranks)))

    @property
    def at_blocks(self) -> bool:
        return self.saved_size % BLOCK == 0 and self.new_size % BLOCK == 0

    def take(self, parts: list[torch.Tensor], scale: int = 1) -> torch.Tensor:
        """Return this rank's elements of ``parts``, with zeros where only padding was saved.

        Args:
            parts: one vector for each of :attr:`parts`.
            scale: elements of the group for each element of these vectors.

        """
        length = self.new_size // scale
        if not parts:
            return torch.zeros(length)
        skip = (self.start - self.parts.start * self.saved_size) // scale
        found = torch.cat(parts)[skip : skip + length]
        return torch.cat([found, found.new_zeros(length - len(found))])


def reshard(
    read: Callable[[int], Tensors], saved_ranks: int, rank: int, sizes: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Build the optimizer state that ``rank`` loads.

    Args:
        read: the tensors that one of the saved ranks wrote (``state.optimizer_tensors``), by ``place.name``.
        saved_ranks: how many there were.
        rank: of the new ones.
        sizes: place → elements of this rank's new part.

    """
    shards = {0: read(0)}
    result = {name: tensor for name, tensor in shards[0].items() if _place(name) not in sizes}
    for place, new_size in sizes.items():
        piece = PartitionSlice.of(shards[0][f"{place}.{WEIGHT}"].numel(), new_size, rank, saved_ranks)
        for part in piece.parts:
            if part not in shards:
                shards[part] = read(part)
        parts = [_of(shards[part], place) for part in piece.parts]
        for name, tensor in _cut(piece, parts, like=_of(shards[0], place)).items():
            result[f"{place}.{name}"] = tensor
    return result


def _place(name: str) -> str:
    """``0.0.state1`` belongs to place ``0.0``."""
    return name.rpartition(".")[0]


def _of(shard: Tensors, place: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{place}."): t for name, t in shard.items() if _place(name) == place}


def _cut(piece: PartitionSlice, parts: list[dict[str, torch.Tensor]], like: Tensors) -> dict[str, torch.Tensor]:
    """Return all tensors of one place.

    Those that are neither elementwise nor blockwise, such as Adam's step, are the same on all ranks.
    """
    result: dict[str, torch.Tensor] = {}
    for name, sample in like.items():
        if name.startswith("absmax"):
            continue
        if sample.numel() != piece.saved_size or name.startswith("qmap"):
            result[name] = sample
        elif sample.dtype == torch.uint8:
            index = name.removeprefix("state")
            codes, scales = _cut_8bit(piece, parts, index, like[f"qmap{index}"])
            result |= {name: codes, f"absmax{index}": scales}
        else:
            result[name] = piece.take([part[name] for part in parts])
    return result


def _cut_8bit(
    piece: PartitionSlice, parts: list[dict[str, torch.Tensor]], index: str, code: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and scales of one moment."""
    codes, scales = [p[f"state{index}"] for p in parts], [p[f"absmax{index}"] for p in parts]
    if piece.at_blocks and parts:
        return piece.take(codes), piece.take(scales, BLOCK)
    whole = [
        functional.dequantize_blockwise(c, absmax=s, code=code, blocksize=BLOCK)
        for c, s in zip(codes, scales, strict=True)
    ]
    quantized, state = functional.quantize_blockwise(piece.take(whole), code=code, blocksize=BLOCK)
    return quantized, state.absmax
