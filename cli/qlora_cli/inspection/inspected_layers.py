"""Rank the layers of a base by what was measured of them, and name those to leave in 16 bits. Pure."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from qlora_api.spec import QuantizationSpec, QuantizationType, is_matched
from qlora_memory.shape.model_shape import Linear
from qlora_memory.weights import BLOCK, constant_bytes, quantized_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

DEFAULT = "NF4+DQ"
"""The default of a job, by whose error layers are ranked."""
FORMATS = {
    "NF4": QuantizationSpec(double_quantization=False),
    DEFAULT: QuantizationSpec(),
    "FP4": QuantizationSpec(type=QuantizationType.FP4, double_quantization=False),
    "INT8": QuantizationSpec(type=QuantizationType.INT8),
}
BLOCKS = (32, 64, 128, 256)
_FROM_LAYER = re.compile(r"(?:layers|layer|h|blocks)\.\d+\..*$")


class Constants(BaseModel):
    """Double quantization of the absmax constants of a layer."""

    count: int
    offset: float
    """Their mean, which is taken off first."""
    error: float
    """‖a - Q(a)‖ / ‖a‖ of the constants."""


class InspectedLayer(BaseModel):
    """A linear layer, or the experts of one parameter: a line of the trainer's."""

    model_config = ConfigDict(frozen=True)

    name: str
    outputs: int
    inputs: int
    experts: int
    squares: float
    """Σ w²."""
    errors: dict[str, float | dict[str, float]]
    """‖W - Q(W)‖ / ‖W‖ by format, and by block size where the format has blocks."""
    constants: dict[str, Constants]
    """By block size."""
    outliers: dict[str, float]
    """Share of the weights beyond so many standard deviations."""
    largest: float
    """Largest distance from the mean, in standard deviations."""

    @property
    def linear(self) -> Linear:
        return Linear(self.name, self.inputs, self.outputs, experts=self.experts)

    @property
    def kind(self) -> str:
        return f"experts.{self.linear.kind}" if self.experts > 1 else self.linear.kind

    def error(self, form: str, block: int = BLOCK) -> float:
        """Return the error of a format, at a block size where it has blocks."""
        found = self.errors[form]
        return found[str(block)] if isinstance(found, dict) else found

    def bytes(self, form: str, block: int = BLOCK) -> int:
        """Return the bytes of weights and constants in a format."""
        quantization = FORMATS[form]
        return quantized_bytes(self.linear, quantization, block) + constant_bytes(self.linear, quantization, block)

    @property
    def kept_bytes(self) -> int:
        """Return what leaving it in 16 bits takes more than the default."""
        return 2 * self.linear.elements - self.bytes(DEFAULT)


@dataclass(frozen=True)
class MeasuredFormat:
    """A format at a block size, of all layers together."""

    form: str
    block: int | None
    """None: the format has a constant for each row."""
    error: float
    bytes: int
    bits: float
    """Bits per weight, quantization constants included."""
    saved_bytes: int
    """Compared with 16 bits."""


@dataclass(frozen=True)
class Inspection:
    """All layers of a base, in the order of their names."""

    model: str
    layers: tuple[InspectedLayer, ...]

    @property
    def elements(self) -> int:
        return sum(layer.linear.elements for layer in self.layers)

    def formats(self) -> Iterator[MeasuredFormat]:
        """Yield each format at each block size."""
        for form in FORMATS:
            for block in BLOCKS if form != "INT8" else (0,):
                size = sum(layer.bytes(form, block) for layer in self.layers)
                error = error_of(self.layers, form, block)
                bits, saved = 8 * size / self.elements, 2 * self.elements - size
                yield MeasuredFormat(form, block or None, error, size, bits, saved)

    def kinds(self) -> dict[str, tuple[InspectedLayer, ...]]:
        """Return the layers of each kind, the kinds with the largest error first."""
        found: dict[str, list[InspectedLayer]] = defaultdict(list)
        for layer in self.layers:
            found[layer.kind].append(layer)
        ranked = sorted(found.items(), key=lambda item: -error_of(item[1], DEFAULT))
        return {kind: tuple(layers) for kind, layers in ranked}

    def worst(self, count: int) -> tuple[InspectedLayer, ...]:
        """Return the layers with the largest error in the default format."""
        return tuple(sorted(self.layers, key=lambda layer: (-layer.error(DEFAULT), layer.name))[:count])

    def error_without(self, skipped: Iterable[InspectedLayer]) -> float:
        """Return the error of the whole base with some layers in 16 bits."""
        names = {layer.name for layer in skipped}
        return error_of(self.layers, DEFAULT, skipped=names)

    def pattern(self, layer: InspectedLayer) -> str:
        """Return what names a layer in ``skipModules``: the shortest end of its name that matches no other."""
        short = _FROM_LAYER.search(layer.name)
        if short and sum(is_matched(other.name, short[0]) for other in self.layers) == 1:
            return short[0]
        return layer.name


def error_of(layers: Sequence[InspectedLayer], form: str, block: int = BLOCK, skipped: Iterable[str] = ()) -> float:
    """Return ‖W - Q(W)‖ / ‖W‖ of several layers together."""
    left_out = set(skipped)
    norm = sum(layer.squares for layer in layers)
    lost = sum(layer.error(form, block) ** 2 * layer.squares for layer in layers if layer.name not in left_out)
    return math.sqrt(lost / norm) if norm else 0.0


def share_of(layers: Sequence[InspectedLayer], sigmas: str) -> float:
    """Return the share of the weights of several layers beyond so many standard deviations."""
    count = sum(layer.linear.elements for layer in layers)
    return sum(layer.outliers.get(sigmas, 0.0) * layer.linear.elements for layer in layers) / count


def sorted_by_name(layers: Iterable[InspectedLayer]) -> tuple[InspectedLayer, ...]:
    """Return layers in the order of their names, numbers by value."""
    return tuple(
        sorted(
            layers, key=lambda layer: [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in layer.name.split(".")]
        )
    )
