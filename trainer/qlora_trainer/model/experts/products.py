"""Products of tokens with the experts that they visit.

The tokens lie in the order of their experts. On a GPU the experts of a chunk are multiplied in one grouped kernel;
elsewhere one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qlora_trainer.model.device.hardware import bf16_in_hardware
from qlora_trainer.model.experts.packed import FrozenExperts

WORKSPACE = 256 << 20
"""Bytes of weights that are dequantized at once; one expert where one is larger."""
_ALIGNMENT = 16
"""Bytes that strides of a grouped product must be multiples of. ``aten/native/GroupedMMUtils.h``."""


@dataclass(frozen=True)
class ExpertAssignment:
    """Experts that tokens are routed to, and the number of tokens of each."""

    experts: list[int]
    """Those that are visited, ascending."""
    counts: list[int]
    """Tokens of each of them."""

    @classmethod
    def of(cls, sorted_experts: torch.Tensor, experts: int) -> ExpertAssignment:
        """Count the tokens of each expert. Waits for the device once.

        Args:
            sorted_experts: [S] the expert of each token, ascending.
            experts: how many there are.

        """
        if sorted_experts.is_meta:  # no values: the tokens visit the first experts, one each
            used = min(len(sorted_experts), experts)
            return cls(list(range(used)), [1] * (used - 1) + [len(sorted_experts) - used + 1])
        counts = torch.bincount(sorted_experts, minlength=experts).tolist()
        visited = [index for index, count in enumerate(counts) if count]
        return cls(visited, [counts[index] for index in visited])

    def chunks(self, at_once: int) -> Iterator[tuple[slice, ExpertAssignment]]:
        """Cut into groups of at most ``at_once`` experts, each with the range of its tokens."""
        start = 0
        for first in range(0, len(self.experts), at_once):
            part = slice(first, first + at_once)
            chunk = ExpertAssignment(self.experts[part], self.counts[part])
            stop = start + sum(chunk.counts)
            yield slice(start, stop), chunk
            start = stop


def frozen_product(
    x: torch.Tensor, weight: nn.Parameter, visits: ExpertAssignment, *, transposed: bool
) -> torch.Tensor:
    """Multiply tokens with the frozen weights of their experts.

    Nothing is kept for the backward pass: it dequantizes the weights again.

    Args:
        x: [S, inputs], tokens in the order of their experts.
        weight: [experts, outputs, inputs], packed or not.
        visits: by the tokens.
        transposed: the weight is [experts, inputs, outputs].

    Returns:
        [S, outputs] in the weight's type.

    """
    out: torch.Tensor = _FrozenProduct.apply(x, weight, visits, transposed)
    return out


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, visits: ExpertAssignment, transposed: bool
    ) -> torch.Tensor:
        ctx.arguments = weight, visits, transposed, x.dtype
        return _multiply(x, FrozenExperts(weight), visits, is_input_first=transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        weight, visits, transposed, dtype = ctx.arguments
        gradient = _multiply(gradients[0], FrozenExperts(weight), visits, is_input_first=not transposed)
        return gradient.to(dtype), None, None, None


def _multiply(
    x: torch.Tensor, experts: FrozenExperts, visits: ExpertAssignment, *, is_input_first: bool
) -> torch.Tensor:
    """Return x·W for weights [inputs, outputs], x·Wᵀ for [outputs, inputs]."""
    x = x.to(experts.dtype)
    out = x.new_empty(len(x), experts.shape[2 if is_input_first else 1])
    for rows, chunk in visits.chunks(max(1, WORKSPACE // experts.bytes_of_one)):
        weights = experts.of(chunk.experts)
        weights = weights if is_input_first else weights.transpose(1, 2)
        if _is_grouped(x, weights):
            out[rows] = grouped_product(x[rows], weights, chunk.counts)
            continue
        parts, places = (tensor[rows].split(chunk.counts) for tensor in (x, out))  # type: ignore[no-untyped-call]
        for part, weight, place in zip(parts, weights, places, strict=True):
            torch.mm(part, weight, out=place)
    return out


def grouped_product(x: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Multiply runs of rows, each with its own matrix.

    Args:
        x: [S, inputs].
        weights: [runs, inputs, outputs].
        counts: rows of each run; their sum is S.

    """
    if _is_grouped(x, weights):
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=x.device)
        return functional.grouped_mm(x, weights, offs=ends)
    parts = x.split(counts)  # type: ignore[no-untyped-call]
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


def _is_grouped(x: torch.Tensor, weights: torch.Tensor) -> bool:
    """Return whether one kernel takes all runs: on a GPU from Ampere on, where strides are aligned."""
    if not x.is_cuda or x.dtype is not torch.bfloat16 or not bf16_in_hardware(x.device):
        return False
    width = x.dtype.itemsize
    return all(size * width % _ALIGNMENT == 0 for size in weights.shape[1:])


def low_rank_product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, visits: ExpertAssignment) -> torch.Tensor:
    """Return B·A·x for the experts of the tokens.

    Args:
        x: [S, inputs].
        a: [experts, rank, inputs].
        b: [experts, outputs, rank].
        visits: by the tokens.

    """
    if len(visits.experts) < len(a):
        chosen = torch.tensor(visits.experts, device=a.device)
        a, b = a[chosen], b[chosen]
    if missing := -a.shape[1] * a.dtype.itemsize % _ALIGNMENT if x.is_cuda else 0:
        a = functional.pad(a, (0, 0, 0, missing // a.dtype.itemsize))
        b = functional.pad(b, (0, missing // b.dtype.itemsize))
    low = grouped_product(x, a.transpose(1, 2), visits.counts)
    return grouped_product(low, b.transpose(1, 2), visits.counts)
