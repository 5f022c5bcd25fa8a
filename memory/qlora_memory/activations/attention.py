"""Attention on a tape: rows cut apart on a GPU and on a CPU, with a mask, and with scores written out.

The GPU's kernel is ``torch.nn.attention.varlen`` and cannot run on a CPU; the CPU's is measured by the tests.
"""

from __future__ import annotations

from typing import assert_never

from qlora_memory.activations.layers import FP32, Pen
from qlora_memory.activations.tape import Value
from qlora_memory.shape.model_shape import Attention, AttentionKind, Norm


def self_attention(pen: Pen, x: Value, attention: Attention, norm: Norm = Norm.RMS) -> Value:
    """Query, key and value, rotated; attention; output."""
    heads, pairs, dim = attention.heads, attention.key_value_heads, attention.head_dim
    if attention.fused is not None:
        both = pen.linear(x, attention.fused)
        query = _view(pen, both, heads * dim)
        key = _view(pen, both, pairs * dim)
        value = both
    else:
        query = pen.linear(x, attention.query) if attention.query else x
        key = pen.linear(x, attention.key) if attention.key else x
        value = pen.linear(x, attention.value) if attention.value else x
    if attention.query_key_norm:
        query, key = pen.norm(query, norm, groups=heads), pen.norm(key, norm, groups=pairs)
    if attention.rotary_dim:
        query, key = _rotated(pen, query), _rotated(pen, key)
    out = _scores(pen, attention, query, key, value)
    return pen.linear(out, attention.output) if attention.output else out


def _view(pen: Pen, whole: Value, features: int) -> Value:
    return pen.tape.record(whole, elements=pen.tokens * features, width=pen.width)


def _rotated(pen: Pen, x: Value) -> Value:
    """x·cos + rotate(x)·sin: cos and sin alone, which all layers share."""
    if pen.setting.software.fused_rotation:
        return x
    kept = (pen.rotation,) if pen.rotation is not None else ()
    return pen.tape.record(
        x, elements=x.elements, width=pen.width, saves=kept, workspace=2 * x.size, backward_workspace=3 * x.size
    )


def _scores(pen: Pen, attention: Attention, query: Value, key: Value, value: Value) -> Value:
    match attention.kind:
        case AttentionKind.EAGER:
            return _eager(pen, attention, query, key, value)
        case AttentionKind.MASKED:
            return _masked(pen, attention, query, key, value)
        case AttentionKind.PACKED:
            flash = pen.setting.cuda and pen.setting.flash and pen.width != FP32 and not attention.dropout
            return (_packed_flash if flash else _packed_rows)(pen, attention, query, key, value)
        case _:
            assert_never(attention.kind)


def _packed_flash(pen: Pen, attention: Attention, query: Value, key: Value, value: Value) -> Value:
    """q, k, v, output, and 4 bytes a head (log-sum-exp). Dao 2023 (FlashAttention-2), section 3.

    Backward: dq in fp32, and dk, dv for every query head before they are summed over groups
    (``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``, mha_varlen_bwd).
    """
    log_sums = Value(pen.tokens * attention.heads, FP32, learns=False)
    expanded = 2 * pen.width * query.elements if attention.heads != attention.key_value_heads else 0
    return pen.tape.record(
        query,
        key,
        value,
        elements=query.elements,
        width=pen.width,
        saves=(query, key, value, log_sums),
        saves_output=True,
        backward_workspace=FP32 * query.elements + expanded,
    )


def _repeated(pen: Pen, x: Value, attention: Attention) -> Value:
    """Keys and values copied for each query head of their group."""
    if attention.heads == attention.key_value_heads:
        return x
    return pen.tape.record(x, elements=pen.tokens * attention.heads * attention.head_dim, width=pen.width)


def _packed_rows(pen: Pen, attention: Attention, query: Value, key: Value, value: Value) -> Value:
    """As with flash, keys and values repeated for their groups, and the output a second time where rows are joined.

    On a CPU, in fp32, and where scores are dropped (``qlora_trainer.model.attention.packed_attention``).
    A row longer than the sliding window brings a mask of its length squared.
    """
    key, value = _repeated(pen, key, attention), _repeated(pen, value, attention)
    window = attention.sliding_window
    masks = [
        Value(row * row, pen.width, learns=False) for row in pen.setting.rows if window is not None and row > window
    ]
    log_sums = Value(pen.tokens * attention.heads, FP32, learns=False)
    rows = pen.tape.record(
        query,
        key,
        value,
        elements=query.elements,
        width=pen.width,
        saves=(query, key, value, log_sums, *masks),
        saves_output=True,
    )
    joined = pen.tape.record(rows, elements=query.elements, width=pen.width)
    return pen.tape.record(joined, elements=query.elements, width=pen.width)


def _masked(pen: Pen, attention: Attention, query: Value, key: Value, value: Value) -> Value:
    """``sdpa`` with a mask: q, k, v repeated for their groups, output, log-sum-exp, w·T² for each layer's mask.

    transformers.integrations.sdpa_attention; ``convert_boolean_attn_mask`` makes the additive mask in every call.
    """
    key, value = _repeated(pen, key, attention), _repeated(pen, value, attention)
    mask = Value(pen.tokens * pen.tokens, pen.width, learns=False)
    log_sums = Value(pen.tokens * attention.heads, FP32, learns=False)
    out = pen.tape.record(
        query,
        key,
        value,
        elements=query.elements,
        width=pen.width,
        saves=(query, key, value, mask, log_sums),
        saves_output=True,
    )
    if attention.fused is None:
        return out
    return pen.tape.record(out, elements=query.elements, width=pen.width)  # Phi 3's layout has it copied


def _eager(pen: Pen, attention: Attention, query: Value, key: Value, value: Value) -> Value:
    """Scores written out, H heads: q, k, v and (w + 4 + w)·H·T² for tanh, softmax in fp32 and probabilities.

    transformers' gemma2.eager_attention_forward.
    """
    key, value = _repeated(pen, key, attention), _repeated(pen, value, attention)
    cells = attention.heads * pen.tokens * pen.tokens
    scores = pen.product(query, key, cells)
    scaled = pen.tape.record(scores, elements=cells, width=pen.width)
    capped = pen.tape.record(scaled, elements=cells, width=pen.width, saves_output=True)
    masked = pen.tape.record(capped, elements=cells, width=pen.width, workspace=pen.width * cells)
    wide = masked if pen.width == FP32 else pen.tape.record(masked, elements=cells, width=FP32)
    product = FP32 * cells if pen.setting.cuda else 0  # grad · output, in ATen's cuda/SoftMax.cu
    softmax = pen.tape.record(wide, elements=cells, width=FP32, saves_output=True, backward_workspace=product)
    weights = (
        softmax
        if pen.width == FP32
        else pen.tape.record(softmax, elements=cells, width=pen.width, workspace=masked.size)
    )
    out = pen.product(weights, value, query.elements)
    return pen.tape.record(out, elements=query.elements, width=pen.width)  # contiguous


def mask_bytes(attention: Attention, tokens: int, width: int) -> int:
    """The [T, T] masks that are made once for all layers.

    Of booleans for ``sdpa``; of numbers where scores are written out, there for full and for sliding attention.
    """
    match attention.kind:
        case AttentionKind.EAGER:
            return 2 * width * tokens * tokens
        case AttentionKind.MASKED:
            return tokens * tokens
        case AttentionKind.PACKED:
            return 0
        case _:
            assert_never(attention.kind)
