"""Expected time and money, from arithmetic and what it is worth on a GPU.

An estimate before the first step, good to a factor of 1.5 either way: the share of a GPU's peak that training reaches
is not known without running it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_api.spec import QuantizationSpec
from qlora_memory.gpus import Gpu
from qlora_memory.shape.model_shape import ModelShape
from qlora_memory.weights import AdapterShape, quantized_layers

EFFICIENCY = (0.35, 0.5, 0.75)
"""Share of the peak: least, expected, most. Published runs reach 41% (NeMo AutoModel, LoRA, H100), 43 to 61% (PEFT
with bitsandbytes, A100), 64% (fms-acceleration, A100) and 71% (torchtune, RTX 4090), recomputation counted."""
SCALING = 0.95
"""Share of one GPU's speed that each of several keeps: 0.98 measured for 2 and 4 (fms-acceleration), less for
waiting."""
DEQUANTIZATION = 4.0
"""Times longer than reading and writing at full bandwidth: 20 ms for 7·10⁹ weights on an H100, 17.5 GB moved."""


@dataclass(frozen=True)
class Span:
    """An expected value and what it will hardly leave."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> Span:
        return Span(self.low * factor, self.expected * factor, self.high * factor)


def flop_per_token(shape: ModelShape, adapter: AdapterShape, row: int, *, recomputes: bool) -> float:
    """Arithmetic of training one token, on a frozen base.

    Each weight costs 2 forward and 2 for the gradient of its input; it has none of its own. What learns costs 6. Causal
    attention over rows of this length is 2·row·(heads·head_dim) a layer forward and 2.5 times that backward
    (Dao 2023, FlashAttention-2, section 4.1). Recomputation repeats the layers' forward pass, not the head's.

    Llama-3-8B at rows of 4,096: 33.8 GFLOP, 48.8 with recomputation (LoRA's own 0.2 left out).
    """
    head = 2.0 * shape.head.linear.elements
    layers = 2.0 * shape.active_linear_elements() - head
    attention = sum(2.0 * row * layer.attention.heads * layer.attention.head_dim for layer in shape.layers)
    learning = 6.0 * adapter.active_parameters
    total = 2 * (layers + head) + 3.5 * attention + learning
    return total + layers + attention if recomputes else total


def dequantization_seconds(shape: ModelShape, quantization: QuantizationSpec, gpu: Gpu) -> float:
    """Time to bring all quantized weights to 16 bits once: each is read packed and written."""
    read = quantization.type.bits / 8
    moved = (read + 2.0) * sum(linear.elements for linear in quantized_layers(shape, quantization))
    return DEQUANTIZATION * moved / gpu.bandwidth


def seconds_per_token(
    shape: ModelShape,
    adapter: AdapterShape,
    quantization: QuantizationSpec,
    gpu: Gpu,
    *,
    row: int,
    tokens: int,
    recomputes: bool,
) -> Span:
    """Time of one token on one GPU in micro-batches of ``tokens``.

    The weights are dequantized once for the whole micro-batch, forward, backward, and where layers are recomputed.
    """
    work = flop_per_token(shape, adapter, row, recomputes=recomputes) / (gpu.tflops * 1e12)
    passes = 3 if recomputes else 2
    overhead = passes * dequantization_seconds(shape, quantization, gpu) / tokens
    least, expected, most = EFFICIENCY
    return Span(work / most + overhead, work / expected + overhead, work / least + overhead)


@dataclass(frozen=True)
class Cost:
    """Expected time of a training."""

    hours: Span
    """Wall-clock time of training alone: no preparation, loading, evaluation or publishing."""
    gpu_hours: Span
    money: Span | None


def cost(per_token: Span, tokens: int, gpus: int, price: float | None) -> Cost:
    """Time and money for so many tokens.

    Args:
        per_token: seconds of one token on one GPU.
        tokens: real tokens over all epochs.
        gpus: how many share them.
        price: of one GPU for one hour; None: not asked.

    """
    scaling = SCALING if gpus > 1 else 1.0
    hours = per_token.times(tokens / gpus / scaling / 3600)
    gpu_hours = hours.times(gpus)
    return Cost(hours, gpu_hours, gpu_hours.times(price) if price is not None else None)
