"""Measure one layer, or the experts of one parameter, matrix by matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_trainer.inspection.quantizers import (
    BLOCK_SIZES,
    BlockErrors,
    block_errors,
    int8_error,
    joined,
    linear_errors,
    quantize_constants,
)

ELEMENTS_AT_ONCE = 1 << 16
"""Weights measured at once on a CPU, whose cache holds the fp32 tensors of their size; whole blocks of every size."""
ELEMENTS_ON_GPU = 1 << 24
LINEAR_BLOCK = 64
"""Block size at which linear formats are compared."""
OUTLIERS = (3, 6)
"""Standard deviations beyond which weights are counted."""


@dataclass
class LayerMeter:
    """Sums over the matrices of one parameter."""

    name: str
    """Full name of the linear layer, or of the experts' parameter."""
    _errors: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _blocks: dict[tuple[str, int], list[BlockErrors]] = field(default_factory=lambda: defaultdict(list))
    _outliers: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _shape: tuple[int, int] = (0, 0)
    _matrices: int = 0
    _squares: float = 0.0
    _largest: float = 0.0
    """In standard deviations of its matrix."""

    def add(self, weight: torch.Tensor) -> None:
        """Measure a matrix.

        Args:
            weight: [outputs, inputs], on any device.

        """
        flat = weight.detach().reshape(-1)
        self._shape, self._matrices = (weight.shape[0], weight.shape[1]), self._matrices + 1
        at_once = ELEMENTS_ON_GPU if weight.is_cuda else ELEMENTS_AT_ONCE
        self._count_outliers(flat, at_once)
        rows = max(1, at_once // weight.shape[1])
        self._errors["INT8"] += sum(int8_error(part) for part in torch.split(weight.detach(), rows))
        for part in torch.split(flat, at_once):
            weights = part.float()
            for kind in ("nf4", "fp4"):
                for block in BLOCK_SIZES:
                    self._blocks[kind.upper(), block].append(block_errors(weights, block, kind))
            symmetric, affine = linear_errors(weights, LINEAR_BLOCK)
            self._errors["INT4 symmetric"] += symmetric
            self._errors["INT4 asymmetric"] += affine

    def _count_outliers(self, flat: torch.Tensor, at_once: int) -> None:
        parts = torch.split(flat, at_once)
        total = sum(float(part.sum(dtype=torch.float64)) for part in parts)
        squares = sum(float(part.double().square().sum()) for part in parts)
        mean = total / len(flat)
        deviation = math.sqrt(max(0.0, squares / len(flat) - mean * mean))
        self._squares += squares
        for part in parts:
            distance = (part.float() - mean).abs()
            self._largest = max(self._largest, float(distance.max()) / deviation if deviation else 0.0)
            for sigmas in OUTLIERS:
                self._outliers[sigmas] += int((distance > sigmas * deviation).sum())

    def result(self) -> dict[str, Any]:
        """Return what was measured; errors are ‖W - Q(W)‖ / ‖W‖."""
        errors: dict[str, Any] = {name: self._relative(error) for name, error in self._errors.items()}
        constants: dict[str, Any] = {}
        for (kind, block), parts in self._blocks.items():
            whole = joined(parts)
            errors.setdefault(kind, {})[str(block)] = self._relative(whole.squared_error())
            if kind == "NF4":
                nested = quantize_constants(whole.absmax)
                errors.setdefault("NF4+DQ", {})[str(block)] = self._relative(whole.squared_error(nested.restored))
                distance = (nested.restored - whole.absmax).double().norm() / whole.absmax.double().norm().clamp(
                    min=1e-38
                )
                constants[str(block)] = {
                    "count": len(whole.absmax),
                    "offset": nested.offset,
                    "error": float(distance),
                }
        outputs, inputs = self._shape
        elements = self._matrices * outputs * inputs
        return {
            "name": self.name,
            "outputs": outputs,
            "inputs": inputs,
            "experts": self._matrices,
            "squares": self._squares,
            "errors": errors,
            "constants": constants,
            "outliers": {str(sigmas): count / elements for sigmas, count in self._outliers.items()},
            "largest": self._largest,
        }

    def _relative(self, squared: float) -> float:
        return math.sqrt(max(0.0, squared) / self._squares) if self._squares else 0.0
