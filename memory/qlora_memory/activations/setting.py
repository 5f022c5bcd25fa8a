"""Properties besides the model that the activations of a forward pass depend on."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_api.spec import QuantizationSpec, QuantizationType
from qlora_memory.shape.model_shape import Linear
from qlora_memory.weights import AdapterShape, compute_width


@dataclass(frozen=True)
class Software:
    """Differences between trainers.

    The defaults are this project's own; others serve to check the formulas on published figures.
    """

    fused_norm: bool = False
    """Every RMS norm in one kernel: keeps its 16-bit input and one fp32 number a token, instead of an fp32 copy."""
    fused_rotation: bool = False
    """Rotary embedding in place."""
    fused_adapter: bool = False
    """Adapter and base in one function, which keeps (dropped) inputs alone and has no intermediate outputs."""
    peft: bool = False
    """The adapter as PEFT writes it: the update is a tensor, which is scaled and added."""
    reentrant: bool = False
    """The older kind of gradient checkpointing, which holds a layer's output while it goes backward."""
    fp32_embeddings: bool = False
    """``prepare_model_for_kbit_training`` lifts embeddings, norms and head to fp32."""
    logits_per_chunk: int = 1 << 25
    """Logits at once in the fused loss: ``qlora_trainer.model.loss.LOGITS_PER_CHUNK``."""


OURS = Software()
"""This project's trainer."""


@dataclass(frozen=True)
class ForwardSetting:
    """One forward pass of one rank."""

    adapter: AdapterShape
    quantization: QuantizationSpec
    rows: tuple[int, ...]
    """Tokens of each row; they lie end to end in one sequence."""
    cuda: bool = True
    flash: bool = True
    """The GPU has flash attention."""
    dequantizes: bool = True
    """False leaves the dequantized weight out, to see what it adds."""
    targets: int | None = None
    """Tokens whose next one counts; None: all."""
    software: Software = OURS

    @property
    def tokens(self) -> int:
        return sum(self.rows)

    @property
    def labelled(self) -> int:
        return self.tokens if self.targets is None else self.targets

    @property
    def width(self) -> int:
        """Bytes of an element in the compute type."""
        return compute_width(self.quantization)

    @property
    def dropout(self) -> float:
        return float(self.adapter.lora.dropout)

    def is_quantized(self, layer: Linear) -> bool:
        """Return whether a linear layer, or experts in 4 bits, are held quantized."""
        return self.quantization.type is not QuantizationType.NONE and not self.quantization.skips(layer.name)

    def dequantized(self, layer: Linear) -> int:
        """Return the bytes of a weight brought back to the compute type.

        With its fp32 absmax constants where those are quantized: bitsandbytes.functional.dequantize_4bit makes them
        twice, before and after the offset is added.
        """
        if not self.dequantizes or not self.is_quantized(layer):
            return 0
        nested = self.quantization.double_quantization and self.quantization.type.is_four_bit
        return self.width * layer.elements + (layer.elements // 8 if nested else 0)
