"""Which part of a base is quantized, and which of its layers are adapted: counts, the words for them, and the plan.

The trainer makes the same counts on the model itself: ``qlora_trainer.model.coverage``.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_api.spec import LoRASpec, QuantizationSpec
from qlora_memory.shape.model_shape import ModelShape
from qlora_memory.weights import AdapterShape, quantized_layers


@dataclass(frozen=True)
class Coverage:
    """Counts of weights and layers."""

    weights: int
    """Elements of the base."""
    quantized: int
    """Of them, those in 4 or 8 bits."""
    layers: int
    """Linear layers besides the head and routers."""
    adapted_layers: int
    """Linear layers with an adapter, the head where it has one."""
    groups: int
    """Layers with experts."""
    adapted_groups: int

    @property
    def adapted(self) -> str:
        """Return what has an adapter, in words."""
        layers = f"{self.adapted_layers} of {self.layers} linear layers"
        if not self.groups:
            return layers
        return f"{layers}, the experts of {self.adapted_groups} of {self.groups} layers"

    @property
    def held(self) -> str:
        """Return how much is quantized, in words."""
        return f"{self.quantized / self.weights:.1%} of {self.weights:,} weights"


def planned_coverage(shape: ModelShape, lora: LoRASpec, quantization: QuantizationSpec) -> Coverage:
    """Count from the shape of a base."""
    adapted = AdapterShape(shape, lora).names
    experts = {weight.name for weight in shape.experts}
    groups = [{weight.name for weight in layer.experts} for layer in shape.layers if layer.experts]
    return Coverage(
        weights=shape.parameters,
        quantized=sum(layer.elements for layer in quantized_layers(shape, quantization)),
        layers=len(shape.linears),
        adapted_layers=len(adapted - experts),
        groups=len(groups),
        adapted_groups=sum(bool(group & adapted) for group in groups),
    )
