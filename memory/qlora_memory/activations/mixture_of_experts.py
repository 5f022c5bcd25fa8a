"""A mixture of experts on a tape: transformers' router and ``grouped_mm_experts_forward``.

T tokens, k experts a token, E experts, H hidden, F intermediate, S = k·T pairs of token and expert.
"""

from __future__ import annotations

from qlora_memory.activations.layers import FP32, INT64, Pen
from qlora_memory.activations.tape import Value
from qlora_memory.shape.model_shape import Experts


def mixture(pen: Pen, x: Value, experts: Experts) -> Value:
    """Router, experts, and the shared expert where there is one."""
    shared = pen.feed_forward(x, experts.shared) if experts.shared else None
    out = _experts(pen, x, experts)
    if shared is None:
        return out
    if experts.shared_gate is not None:
        score = pen.linear(x, experts.shared_gate)
        gate = pen.tape.record(score, elements=score.elements, width=pen.width, saves_output=True)
        shared = pen.product(gate, shared, shared.elements)
    return pen.add(out, shared)


def _router(pen: Pen, x: Value, experts: Experts) -> Value:
    """4·E for the softmax, 8·k for the choice, and 8·k + … where weights are divided by their sum."""
    logits = pen.tape.record(x, elements=pen.tokens * experts.count, width=pen.width)
    shares = pen.tape.record(logits, elements=logits.elements, width=FP32, saves_output=True)
    pairs = pen.tokens * experts.per_token
    choice = Value(pairs, INT64, learns=False)
    best = pen.tape.record(shares, elements=pairs, width=FP32, saves=(choice,))
    if experts.normalized:
        total = Value(pen.tokens, FP32, learns=False)
        best = pen.tape.record(best, elements=pairs, width=FP32, saves=(total, best))
    if not experts.fp32_weights and pen.width != FP32:
        best = pen.tape.record(best, elements=pairs, width=pen.width)
    return best


def _experts(pen: Pen, x: Value, experts: Experts) -> Value:
    """S·(w·(3·F + H) + 3·8): gate and up in one, the activated gate, what comes down, and the order of the pairs.

    The weights are frozen parameters: a grouped product keeps neither its input nor a copy of them.
    """
    tape, width = pen.tape, pen.width
    pairs = pen.tokens * experts.per_token
    weights = _router(pen, x, experts)
    orders = [Value(pairs, INT64, learns=False) for _ in range(3)]
    chosen = tape.record(x, elements=pairs * x.elements // pen.tokens, width=width, saves=(orders[0],))
    picked = tape.record(weights, elements=pairs, width=weights.width, saves=(orders[1],))
    both = tape.record(chosen, elements=2 * pairs * experts.intermediate, width=width)
    inner = pen.gated(both)
    down = tape.record(inner, elements=chosen.elements, width=width)
    weighted = pen.product(down, picked, down.elements)
    restored = tape.record(
        weighted,
        elements=down.elements,
        width=picked.width,
        saves=(orders[2],),
        workspace=chosen.size,  # a local variable of that function holds it to the end
    )
    return tape.record(restored, elements=x.elements, width=width)
