"""Bytes of the weights: the frozen base as bitsandbytes holds it, and the adapter.

Tensors are counted by their contents. On a GPU PyTorch's allocator rounds each up to 512 bytes
(``c10/cuda/CUDACachingAllocator``, kMinBlockSize); :func:`rounding` is what that adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

from qlora_api.errors import FieldError
from qlora_api.spec import ComputeType, LoRABias, LoRASpec, QuantizationSpec, QuantizationType
from qlora_memory.shape.model_shape import Experts, Linear, ModelShape

BLOCK = 64
"""Weights that share an absmax. Dettmers et al. 2023, section 3; bitsandbytes.functional.quantize_4bit."""
NESTED_BLOCK = 256
"""Absmax constants that share one of their own; bitsandbytes.functional.quantize_4bit, ``compress_statistics``."""
CODE = 16 * 4
"""fp32 table of the sixteen values, one for each layer."""
NESTED_CODE = 256 * 4
"""fp32 table of the 256 values that absmax constants take, one for each layer."""
NESTED_OFFSET = 4
"""The mean that is taken off absmax constants before they are quantized, fp32."""
ALLOCATION = 512
"""Bytes that PyTorch's CUDA allocator rounds up to."""


def compute_width(quantization: QuantizationSpec) -> int:
    """Return the bytes of an element in the compute type."""
    return 4 if quantization.compute_type is ComputeType.FLOAT32 else 2


def quantized_layers(shape: ModelShape, quantization: QuantizationSpec) -> tuple[Linear, ...]:
    """Return what is quantized: of all that can be, what the job does not leave in 16 bits."""
    found = quantizable_layers(shape, quantization.type)
    return tuple(i for i in found if not quantization.skips(i.name)) if quantization.skip_modules else found


def quantizable_layers(shape: ModelShape, kind: QuantizationType) -> tuple[Linear, ...]:
    """Return what can be quantized: all linear layers but the head, and in 4 bits the experts."""
    match kind:
        case QuantizationType.NONE:
            return ()
        case QuantizationType.INT8:
            found = shape.linears
        case QuantizationType.NF4 | QuantizationType.FP4:
            found = (*shape.linears, *shape.experts)
        case _:
            assert_never(kind)
    return tuple(weight for weight in found if weight.quantizable)


def quantized_bytes(linear: Linear, quantization: QuantizationSpec, block: int = BLOCK) -> int:
    """Bytes of one layer's weight: two to a byte in NF4 and FP4, one in INT8, none here where it is not quantized.

    bitsandbytes.functional.quantize_4bit packs into ⌈n / 2⌉ bytes; an expert fills whole blocks.
    """
    match quantization.type:
        case QuantizationType.NONE:
            return 0
        case QuantizationType.INT8:
            return linear.elements
        case QuantizationType.NF4 | QuantizationType.FP4:
            return -(-linear.elements // 2) if linear.experts == 1 else block // 2 * _blocks(linear, block)
        case _:
            assert_never(quantization.type)


def skipped_bytes(shape: ModelShape, quantization: QuantizationSpec) -> tuple[int, int]:
    """Return how many layers ``skipModules`` leaves in 16 bits, and the bytes that they take more for it."""
    skipped = [i for i in quantizable_layers(shape, quantization.type) if quantization.skips(i.name)]
    quantized = sum(quantized_bytes(i, quantization) + constant_bytes(i, quantization) for i in skipped)
    return len(skipped), compute_width(quantization) * sum(i.elements for i in skipped) - quantized


def constant_bytes(linear: Linear, quantization: QuantizationSpec, block: int = BLOCK) -> int:
    """Return the bytes of one layer's quantization constants.

    Single: 4·⌈n/64⌉ + code. Double: ⌈n/64⌉ + 4·⌈⌈n/64⌉/256⌉ + both codes + offset. Dettmers et al. 2023, section 3:
    0.5 and 0.127 bits a weight. INT8: one fp32 scale a row. Dettmers et al. 2022 (LLM.int8), section 3.1.
    """
    match quantization.type:
        case QuantizationType.NONE:
            return 0
        case QuantizationType.INT8:
            return 4 * linear.outputs
        case QuantizationType.NF4 | QuantizationType.FP4:
            blocks = _blocks(linear, block)
            if not quantization.double_quantization:
                return 4 * blocks + CODE
            return blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + CODE + NESTED_CODE + NESTED_OFFSET
        case _:
            assert_never(quantization.type)


def _blocks(linear: Linear, block: int = BLOCK) -> int:
    """Blocks of weights that share an absmax; each expert begins with one."""
    return linear.experts * math.ceil(linear.inputs * linear.outputs / block)


def rounding(linear: Linear, quantization: QuantizationSpec) -> int:
    """Return bytes that the allocator adds to one quantized layer: codes and offset are far smaller than its 512."""
    if not quantization.type.is_four_bit:
        return 0
    blocks = _blocks(linear)
    sizes = [quantized_bytes(linear, quantization), CODE]
    sizes += (
        [blocks, 4 * math.ceil(blocks / NESTED_BLOCK), NESTED_CODE, NESTED_OFFSET]
        if quantization.double_quantization
        else [4 * blocks]
    )
    return sum(-size % ALLOCATION for size in sizes)


@dataclass(frozen=True)
class AdapterShape:
    """Layers that get an adapter, and the adapter's size. Hu et al. 2021, section 4.1."""

    shape: ModelShape
    lora: LoRASpec

    @cached_property
    def layers(self) -> tuple[Linear, ...]:
        """The adapted layers: all linear layers but the head, and all experts, or those that a target names.

        The same decision as ``qlora_trainer.model.experts.targets``: a target is a full name or its dotted end; the
        head is adapted only if it is named.

        Raises:
            FieldError: a target names none, or experts would be adapted by DoRA.

        """
        found = self._named()
        if self.lora.dora and any(layer.experts > 1 for layer in found):
            raise FieldError(
                "spec.lora.dora",
                self.lora.dora,
                "is not available for experts, which the base has: set false, or name linear layers in "
                "spec.lora.targetModules",
            )
        return found

    def _named(self) -> tuple[Linear, ...]:
        if self.lora.target_modules is None:
            return tuple(linear for linear in (*self.shape.linears, *self.shape.experts) if linear.learns)
        candidates = (*self.shape.linears, *self.shape.experts, self.shape.head.linear)
        for target in self.lora.target_modules:
            if not any(is_named(layer.name, target) for layer in candidates):
                kinds = ", ".join(sorted({layer.kind for layer in candidates}))
                raise FieldError(
                    "spec.lora.targetModules",
                    target,
                    f"matches no linear layer of the base; its linear layers are {kinds}",
                )
        return tuple(c for c in candidates if any(is_named(c.name, t) for t in self.lora.target_modules))

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(layer.name for layer in self.layers)

    @property
    def trains_head(self) -> bool:
        """Something of the head learns: then the model computes its own logits."""
        head = self.shape.head.linear
        return head.name in self.names or (self.lora.bias is LoRABias.ALL and head.bias)

    @cached_property
    def matrices(self) -> tuple[int, ...]:
        """Elements of each A [rank, inputs] and B [outputs, rank], in the trainer's order: by name."""
        rank = self.lora.rank
        ordered = sorted(self.layers, key=lambda layer: layer.name)
        return tuple(
            n for layer in ordered for n in (rank * layer.experts * layer.inputs, rank * layer.experts * layer.outputs)
        )

    @cached_property
    def vectors(self) -> tuple[int, ...]:
        """Elements of each tensor without weight decay: embeddings of tokens, DoRA's magnitudes [outputs], biases."""
        tokens = len(self.lora.train_tokens) * self.shape.head.linear.inputs
        found = [layer.outputs for layer in self.layers] if self.lora.dora else []
        return (*((tokens,) if tokens else ()), *found, *self._biases)

    @cached_property
    def _biases(self) -> tuple[int, ...]:
        match self.lora.bias:
            case LoRABias.NONE:
                return ()
            case LoRABias.LORA_ONLY:
                return tuple(layer.outputs for layer in self.layers if layer.bias)
            case LoRABias.ALL:
                linears = [layer for layer in (*self.shape.linears, self.shape.head.linear) if layer.bias]
                norms = self.shape.norm_biases // self.shape.hidden
                return (*(layer.outputs for layer in linears), *(self.shape.hidden,) * norms)

    @property
    def tensors(self) -> tuple[int, ...]:
        return (*self.matrices, *self.vectors)

    @property
    def parameters(self) -> int:
        """Elements of all that learns."""
        return sum(self.tensors)

    @property
    def active_parameters(self) -> float:
        """Elements of what learns that take part in computing one token."""
        chosen = {
            weight.name: layer.feed_forward.per_token / layer.feed_forward.count
            for layer in self.shape.layers
            if isinstance(layer.feed_forward, Experts)
            for weight in layer.feed_forward.weights
        }
        rank = self.lora.rank
        idle = sum(
            (1 - chosen[i.name]) * rank * i.experts * (i.inputs + i.outputs) for i in self.layers if i.name in chosen
        )
        return self.parameters - idle

    @property
    def bytes(self) -> int:
        """Return the bytes of trainable weights. They are fp32: 4 bytes an element. docs/decisions/0001."""
        return 4 * self.parameters

    @property
    def trained_biases(self) -> int:
        """Elements of biases that learn: they are part of the adapter, no longer of the frozen rest."""
        return sum(self._biases)


def is_named(name: str, target: str) -> bool:
    """A target is a layer's name or its dotted end."""
    return name == target or name.endswith(f".{target}")


def unquantized_bytes(shape: ModelShape, quantization: QuantizationSpec, adapter: AdapterShape) -> int:
    """Return the bytes of what is frozen and not quantized, in the compute type, in which the base is loaded.

    Embeddings, norms, biases, routers and the head; experts too in INT8, all where there is no quantization. The
    trainer does not lift embeddings and head to fp32 as ``prepare_model_for_kbit_training`` would.
    """
    frozen = shape.parameters - adapter.trained_biases
    frozen -= sum(linear.elements for linear in quantized_layers(shape, quantization))
    return compute_width(quantization) * (frozen - shape.fixed) + shape.fixed_bytes


def base_bytes(shape: ModelShape, quantization: QuantizationSpec, adapter: AdapterShape) -> int:
    """Return the bytes of the frozen base as a whole."""
    layers = quantized_layers(shape, quantization)
    packed = sum(quantized_bytes(i, quantization) + constant_bytes(i, quantization) for i in layers)
    return packed + unquantized_bytes(shape, quantization, adapter)
