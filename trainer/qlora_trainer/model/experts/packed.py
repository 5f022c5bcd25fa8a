"""Experts in 4 bits: each packed by itself, with constants as bitsandbytes makes them for one tensor of all.

Dettmers et al. 2023, section 3. An expert begins with a block of its own, so that any choice of experts is dequantized
without the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import nn
from torch.nn import functional

BLOCK = 64
"""Weights that share an absmax."""
NESTED_BLOCK = 256
"""Absmax constants that share one of their own, as in ``bitsandbytes.functional.quantize_4bit``."""

ELEMENTS_AT_ONCE = 1 << 16
"""Weights quantized by one call on a CPU, where bitsandbytes compares each with all sixteen values at once."""


@dataclass(frozen=True)
class Format:
    """Format in which experts are held."""

    quant_type: str
    """"nf4" or "fp4"."""
    double: bool
    """Quantize the absmax constants as well."""
    storage: torch.dtype = torch.uint8
    """Type as which the packed bytes appear."""


class Packer:
    """Packs the experts of one parameter, one after another.

    Args:
        shape: [experts, rows, columns] of the parameter.
        dtype: of the dequantized weights.
        device: where the packed weights are held.
        form: how.

    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, form: Format) -> None:
        self._shape, self._dtype, self._form = shape, dtype, form
        self._padding = -(shape[1] * shape[2]) % BLOCK
        blocks = math.ceil(shape[1] * shape[2] / BLOCK)
        self._packed = torch.empty(shape[0], blocks * BLOCK // 2, dtype=torch.uint8, device=device)
        self._absmax = torch.empty(shape[0], blocks, dtype=torch.float32, device=device)

    def put(self, index: int, weight: torch.Tensor) -> None:
        """Quantize one expert.

        Args:
            index: of the expert.
            weight: [rows, columns], on any device.

        """
        flat = weight.to(self._packed.device, self._dtype).reshape(-1)
        flat = functional.pad(flat, (0, self._padding)) if self._padding else flat
        at_once = len(flat) if flat.is_cuda else ELEMENTS_AT_ONCE
        for start in range(0, len(flat), at_once):
            part = flat[start : start + at_once]
            packed, state = bnb.quantize_4bit(part, blocksize=BLOCK, quant_type=self._form.quant_type)
            self._packed[index, start // 2 : (start + len(part)) // 2] = packed.view(-1)
            self._absmax[index, start // BLOCK : (start + len(part)) // BLOCK] = state.absmax

    def parameter(self) -> nn.Parameter:
        """Return the packed experts, as a parameter whose ``quant_state`` is bitsandbytes' own."""
        absmax, offset, nested = self._absmax.view(-1), None, None
        if self._form.double:
            offset = absmax.mean()
            absmax, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        parameter = nn.Parameter(self._packed.view(self._form.storage), requires_grad=False)
        parameter.quant_state = bnb.QuantState(  # type: ignore[attr-defined] # as bitsandbytes' own parameters have it
            absmax=absmax,
            shape=self._shape,
            code=bnb.get_4bit_type(self._form.quant_type, device=absmax.device),
            blocksize=BLOCK,
            quant_type=self._form.quant_type,
            dtype=self._dtype,
            offset=offset,
            state2=nested,
        )
        return parameter


class Stack:
    """Holds the experts of one parameter as they are; takes them as :class:`Packer` does."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, _: Format) -> None:
        self._weights = torch.empty(shape, dtype=dtype, device=device)

    def put(self, index: int, weight: torch.Tensor) -> None:
        """Copy one expert to its place."""
        self._weights[index].copy_(weight)

    def parameter(self) -> nn.Parameter:
        """Return the experts in 16 bits."""
        return nn.Parameter(self._weights, requires_grad=False)


class FrozenExperts:
    """The weights of a group of experts for the time of one product: packed in 4 bits, or as they were loaded."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self._state: Any = getattr(parameter, "quant_state", None)
        self._absmax: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[experts, rows, columns]."""
        return self._parameter.shape if self._state is None else self._state.shape

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._parameter.dtype if self._state is None else self._state.dtype
        return dtype

    @property
    def bytes_of_one(self) -> int:
        """Bytes of one expert that is not packed."""
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def of(self, experts: list[int]) -> torch.Tensor:
        """Return the weights of some experts, [experts, rows, columns]; ``experts`` ascend."""
        if self._state is None:
            return _chosen(self._parameter.detach(), experts)
        count, rows, columns = self.shape
        packed = self._parameter.data.view(torch.uint8).view(count, -1)
        absmax = _chosen(self._constants().view(count, -1), experts)
        flat = torch.ops.bitsandbytes.dequantize_4bit.default(
            _chosen(packed, experts).reshape(-1, 1),
            absmax.reshape(-1),
            BLOCK,
            self._state.quant_type,
            (absmax.numel() * BLOCK,),
            self.dtype,
        )
        weights: torch.Tensor = flat.view(len(experts), -1)[:, : rows * columns].view(-1, rows, columns)
        return weights

    def _constants(self) -> torch.Tensor:
        if self._absmax is None:
            state = self._state
            self._absmax = (
                state.absmax
                if state.state2 is None
                else bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            )
        return self._absmax


def _chosen(tensor: torch.Tensor, experts: list[int]) -> torch.Tensor:
    """Return some experts of a tensor, without a copy where they follow one another."""
    first, last = experts[0], experts[-1]
    if last - first + 1 == len(experts):
        return tensor[first : last + 1]
    return tensor[torch.tensor(experts, device=tensor.device)]
