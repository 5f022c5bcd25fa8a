"""A mixture of experts on a tape: transformers' router and ``qlora_trainer.model.experts.forward``.

T tokens, k experts a token, E experts, H hidden, F intermediate, S = k·T pairs of token and expert.
"""

from __future__ import annotations

from qlora_memory.activations.layers import FP32, INT64, LayerRecorder
from qlora_memory.activations.tape import Value
from qlora_memory.shape.model_shape import Experts, Linear
from qlora_memory.weights import BLOCK


def mixture(recorder: LayerRecorder, x: Value, experts: Experts) -> Value:
    """Router, experts, and the shared expert where there is one."""
    shared = recorder.feed_forward(x, experts.shared) if experts.shared else None
    out = _experts(recorder, x, experts)
    if shared is None:
        return out
    if experts.shared_gate is not None:
        score = recorder.linear(x, experts.shared_gate)
        gate = recorder.tape.record(score, elements=score.elements, width=recorder.width, saves_output=True)
        shared = recorder.product(gate, shared, shared.elements)
    return recorder.add(out, shared)


def _router(recorder: LayerRecorder, x: Value, experts: Experts) -> Value:
    """4·E for the softmax, 8·k for the choice, and 8·k + … where weights are divided by their sum."""
    logits = recorder.tape.record(x, elements=recorder.tokens * experts.count, width=recorder.width)
    shares = recorder.tape.record(logits, elements=logits.elements, width=FP32, saves_output=True)
    pairs = recorder.tokens * experts.per_token
    choice = Value(pairs, INT64, learns=False)
    best = recorder.tape.record(shares, elements=pairs, width=FP32, saves=(choice,))
    if experts.normalized:
        total = Value(recorder.tokens, FP32, learns=False)
        best = recorder.tape.record(best, elements=pairs, width=FP32, saves=(total, best))
    if not experts.fp32_weights and recorder.width != FP32:
        best = recorder.tape.record(best, elements=pairs, width=recorder.width)
    return best


WORKSPACE = 256 << 20
"""Bytes of weights dequantized at once: ``qlora_trainer.model.experts.products.WORKSPACE``."""


def _experts(recorder: LayerRecorder, x: Value, experts: Experts) -> Value:
    """S·(w·(3·F + H) + 3·8): gate and up in one, the activated gate, what comes down, and the order of the pairs.

    Adapted, S·w·(H + F + 2·rank) besides, and once the factors in the compute type.
    """
    up, down = experts.weights[0], experts.weights[-1]
    tape, width = recorder.tape, recorder.width
    pairs = recorder.tokens * experts.per_token
    weights = _router(recorder, x, experts)
    orders = [Value(pairs, INT64, learns=False) for _ in range(3)]
    chosen = tape.record(x, elements=pairs * x.elements // recorder.tokens, width=width, saves=(orders[0],))
    picked = tape.record(weights, elements=pairs, width=weights.width, saves=(orders[1],))
    both = _product(recorder, chosen, up, pairs)
    inner = recorder.gated(both)
    out = _product(recorder, inner, down, pairs)
    weighted = recorder.product(out, picked, out.elements)
    restored = tape.record(
        weighted,
        elements=out.elements,
        width=picked.width,
        saves=(orders[2],),
        workspace=chosen.size,  # a local variable of that function holds it to the end
    )
    return tape.record(restored, elements=x.elements, width=width)


def _product(recorder: LayerRecorder, x: Value, weight: Linear, pairs: int) -> Value:
    """Return one product with the experts' weights, of which it keeps nothing; adapted: x, A·x, and the factors cast.

    The update is added in place.
    """
    tape, width = recorder.tape, recorder.width
    dequantized = _dequantized(recorder, weight)
    base = tape.record(
        x,
        elements=pairs * weight.outputs,
        width=width,
        workspace=dequantized,
        backward_workspace=dequantized,
    )
    if weight.name not in recorder.setting.adapter.names:
        return base
    rank = recorder.setting.adapter.lora.rank
    dropped = recorder.dropout(x, recorder.setting.dropout)
    a, b = (Value(rank * weight.experts * size, width, learns=True) for size in (weight.inputs, weight.outputs))
    kept = (a,) if dropped.learns and width != FP32 else ()  # in fp32 it is the parameter itself
    low = tape.record(dropped, a, elements=pairs * rank, width=width, saves=(dropped, *kept))
    update = tape.record(low, b, elements=base.elements, width=width, saves=(low, b))
    return tape.record(base, update, elements=base.elements, width=width, passes_gradient=True, view=True)


def _dequantized(recorder: LayerRecorder, weight: Linear) -> int:
    """Return the bytes of the experts that are dequantized at once, and of the fp32 constants of all."""
    setting = recorder.setting
    if not setting.dequantizes or not setting.quantization.type.is_four_bit or not setting.is_quantized(weight):
        return 0
    one = recorder.width * weight.inputs * weight.outputs
    constants = FP32 * weight.elements // BLOCK if setting.quantization.double_quantization else 0
    return min(one * weight.experts, max(one, WORKSPACE // one * one)) + 2 * constants
