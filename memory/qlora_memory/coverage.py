"""Count the parameters of a base that are quantized and the layers that are adapted, and describe them.

The trainer makes the same counts on the model itself: ``qlora_trainer.model.coverage``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qlora_api.errors import FieldError
from qlora_api.spec import LoRASpec, QuantizationSpec, is_matched
from qlora_memory.shape.model_shape import ModelShape
from qlora_memory.weights import AdapterShape, quantized_layers


@dataclass(frozen=True)
class Coverage:
    """Counts of weights and layers."""

    weights: int
    """Elements of the base."""
    quantized: int
    """Weights among them that are in 4 or 8 bits."""
    layers: int
    """Linear layers besides the head and routers."""
    adapted_layers: int
    """Linear layers with an adapter, the head where it has one."""
    groups: int
    """Layers with experts."""
    adapted_groups: int
    tokens: int = 0
    """Tokens whose embeddings are trained."""

    @property
    def adapted(self) -> str:
        """Return what has an adapter, in words."""
        parts = [f"{self.adapted_layers} of {self.layers} linear layers"]
        if self.groups:
            parts.append(f"the experts of {self.adapted_groups} of {self.groups} layers")
        if self.tokens:
            parts.append(
                f"the embedding{'s' if self.tokens > 1 else ''} of {self.tokens} token{'s' if self.tokens > 1 else ''}"
            )
        return ", ".join(parts)

    @property
    def notes(self) -> tuple[str, str]:
        """Return both as sentences."""
        return f"quantized: {self.held}", f"adapted: {self.adapted}"

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
        tokens=len(lora.train_tokens),
    )


def check_skip_modules(quantization: QuantizationSpec, names: Iterable[str], *, on_disk: bool) -> None:
    """Find out whether ``spec.quantization.skipModules`` can be followed.

    Args:
        quantization: of the job.
        names: full names of all that can be quantized: linear layers, and in 4 bits experts.
        on_disk: the base is quantized on disk.

    Raises:
        FieldError: it cannot, or leaves nothing quantized; the message lists what can be named.

    """
    field, patterns = "spec.quantization.skipModules", quantization.skip_modules
    if not patterns:
        return
    if on_disk:
        raise FieldError(
            field,
            patterns[0],
            "cannot be followed: the base is quantized on disk. Remove it, or use the 16-bit base",
        )
    candidates = tuple(names)
    for pattern in patterns:
        if not any(is_matched(name, pattern) for name in candidates):
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in candidates}))
            others = "embeddings" if quantization.type.is_four_bit else "experts, embeddings"
            raise FieldError(
                field,
                pattern,
                f"matches no layer that would be quantized; those are {kinds}. Of themselves {others}, head, norms and "
                "routers stay in 16 bits",
            )
    if all(quantization.skips(name) for name in candidates):
        raise FieldError(field, ", ".join(patterns), "leaves no layer quantized: name fewer, or set type None")
