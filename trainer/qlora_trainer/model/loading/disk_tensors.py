"""Tensors of a base on disk, read slice by slice, and dequantized as they are read where they are MXFP4 or FP8.

What reads them finds the names and shapes of the 16-bit base. Of experts in one tensor each is dequantized by itself.
The values are those that transformers' own functions give: ``Fp8Dequantize`` and ``convert_moe_packed_tensors``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_memory.shape.on_disk import BLOCKS, FP8, SCALES, UNUSED, is_scale, scales_of
from qlora_trainer.errors import TrainerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


ELEMENTS_AT_ONCE = 1 << 21
"""Elements of a weight that are dequantized at a time: meanwhile FP8 values and their products with the scales are
fp32, and MXFP4 values are int64."""
MXFP4_GROUP = 32
"""Elements that share a scale."""


class DiskTensors:
    """The tensors of a base by name, each a slice: read when it is indexed.

    Args:
        paths: of its safetensors files.
        dtype: of what is dequantized.
        block: rows and columns of FP8 weights that share a scale.

    """

    def __init__(
        self, paths: Iterable[str], dtype: torch.dtype = torch.bfloat16, block: tuple[int, int] = (128, 128)
    ) -> None:
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # type: ignore[no-untyped-call] # noqa: SIM118 it is no dictionary
        self._dtype, self._block = dtype, block

    def __iter__(self) -> Iterator[str]:
        for name in self._file_of:
            if name.endswith(BLOCKS):
                yield name.removesuffix(BLOCKS)
            elif not (is_scale(name, self._file_of) or name.endswith(UNUSED)):
                yield name

    def __getitem__(self, name: str) -> Any:
        """Return a slice.

        Raises:
            TrainerError: it is in FP8 and has no scales.

        """
        if f"{name}{BLOCKS}" in self._file_of:
            return _Mxfp4(self._raw(f"{name}{BLOCKS}"), self._raw(f"{name}{SCALES}"), self._dtype)
        raw = self._raw(name)
        if not str(raw.get_dtype()).startswith(FP8):
            return raw
        scales = scales_of(name, self._file_of)
        if scales is None:
            raise TrainerError(f"{name} is in FP8 and has no scales")
        return _Fp8(raw, self._raw(scales), self._dtype, self._block)

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskTensors:
        """Return itself: open files are not copied."""
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return all slices by name, as ``from_pretrained`` takes them for a ``state_dict``."""
        return {name: self[name] for name in self}

    def _raw(self, name: str) -> Any:
        return self._file_of[name].get_slice(name)  # type: ignore[no-untyped-call]


class _Fp8:
    """A weight in FP8 with one scale for each block, or one for all."""

    def __init__(self, weight: Any, scales: Any, dtype: torch.dtype, block: tuple[int, int]) -> None:
        self._weight, self._scales, self._dtype, self._block = weight, scales, dtype, block

    def get_shape(self) -> list[int]:
        shape: list[int] = self._weight.get_shape()
        return shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        if len(self.get_shape()) > 2:  # of experts only those that are asked for are read
            return dequantized_fp8(self._weight[index], self._scales[index], self._dtype, self._block)
        return dequantized_fp8(self._weight[...], self._scales[...], self._dtype, self._block)[index]


class _Mxfp4:
    """Experts in MXFP4: [experts, outputs, groups, 16] bytes, and [experts, outputs, groups] exponents."""

    def __init__(self, blocks: Any, scales: Any, dtype: torch.dtype) -> None:
        self._blocks, self._scales, self._dtype = blocks, scales, dtype

    def get_shape(self) -> list[int]:
        experts, outputs, groups, size = self._blocks.get_shape()
        return [experts, groups * size * 2, outputs]

    def __getitem__(self, index: Any) -> torch.Tensor:
        index = slice(None) if index is Ellipsis else index
        made: torch.Tensor = convert_moe_packed_tensors(
            self._blocks[index], self._scales[index], dtype=self._dtype, rows_per_chunk=ELEMENTS_AT_ONCE // MXFP4_GROUP
        )
        return made


def dequantized_fp8(
    weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]
) -> torch.Tensor:
    """Return a weight in FP8 times its scales.

    Args:
        weight: [..., rows, columns].
        scales: [..., ⌈rows / block⌉, ⌈columns / block⌉], or a single one.
        dtype: of the result.
        block: rows and columns that share a scale.

    """
    rows, columns = weight.shape[-2:]
    blocks = -(-rows // block[0]), -(-columns // block[1])
    has_blocks = tuple(scales.shape[-2:]) == blocks
    at_once = max(1, ELEMENTS_AT_ONCE // (block[0] * columns))  # rows of blocks
    if has_blocks and blocks[0] > at_once:
        made = torch.empty(weight.shape, dtype=dtype)
        for start in range(0, blocks[0], at_once):
            part = slice(start * block[0], (start + at_once) * block[0])
            own = scales[..., start : start + at_once, :]
            made[..., part, :] = dequantized_fp8(weight[..., part, :], own, dtype, block)
        return made
    if has_blocks and (rows % block[0] or columns % block[1]):  # the last blocks are cut
        padded = torch.zeros(
            *weight.shape[:-2], scales.shape[-2] * block[0], scales.shape[-1] * block[1], dtype=weight.dtype
        )
        padded[..., :rows, :columns] = weight
        return dequantized_fp8(padded, scales, dtype, block)[..., :rows, :columns].contiguous()
    whole: torch.Tensor = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=dtype)  # noqa: SLF001 its only name
    return whole
