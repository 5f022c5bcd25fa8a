"""Attention on a tape: rows cut apart on a GPU and on a CPU, with a mask, and with scores written out.

The GPU's kernel is ``torch.nn.attention.varlen`` and cannot run on a CPU; the CPU's is measured by the tests.
"""

from __future__ import annotations

from typing import assert_never

from qlora_memory.activations.layers import FP32, LayerRecorder
from qlora_memory.activations.tape import Value
from qlora_memory.shape.model_shape import Attention, AttentionKind, Norm


def self_attention(recorder: LayerRecorder, x: Value, attention: Attention, norm: Norm = Norm.RMS) -> Value:
    """Query, key and value, rotated; attention; output."""
    heads, pairs, dim = attention.heads, attention.key_value_heads, attention.head_dim
    if attention.fused is not None:
        both = recorder.linear(x, attention.fused)
        query = _view(recorder, both, heads * dim)
        key = _view(recorder, both, pairs * dim)
        value = both
    else:
        query = recorder.linear(x, attention.query) if attention.query else x
        key = recorder.linear(x, attention.key) if attention.key else x
        value = recorder.linear(x, attention.value) if attention.value else x
    if attention.query_key_norm:
        query, key = recorder.norm(query, norm, groups=heads), recorder.norm(key, norm, groups=pairs)
    if attention.rotary_dim:
        query, key = _rotated(recorder, query), _rotated(recorder, key)
    out = _scores(recorder, attention, query, key, value)
    return recorder.linear(out, attention.output) if attention.output else out


def _view(recorder: LayerRecorder, whole: Value, features: int) -> Value:
    return recorder.tape.record(whole, elements=recorder.tokens * features, width=recorder.width)


def _rotated(recorder: LayerRecorder, x: Value) -> Value:
    """x·cos + rotate(x)·sin: cos and sin alone, which all layers share."""
    if recorder.setting.software.fused_rotation:
        return x
    kept = (recorder.rotation,) if recorder.rotation is not None else ()
    return recorder.tape.record(
        x, elements=x.elements, width=recorder.width, saves=kept, workspace=2 * x.size, backward_workspace=3 * x.size
    )


def _scores(recorder: LayerRecorder, attention: Attention, query: Value, key: Value, value: Value) -> Value:
    match attention.kind:
        case AttentionKind.EAGER:
            return _eager(recorder, attention, query, key, value)
        case AttentionKind.MASKED:
            return _masked(recorder, attention, query, key, value)
        case AttentionKind.PACKED:
            flash = (
                recorder.setting.cuda and recorder.setting.flash and recorder.width != FP32 and not attention.dropout
            )
            return (_packed_flash if flash else _packed_rows)(recorder, attention, query, key, value)
        case _:
            assert_never(attention.kind)


def _packed_flash(recorder: LayerRecorder, attention: Attention, query: Value, key: Value, value: Value) -> Value:
    """q, k, v, output, and 4 bytes a head (log-sum-exp). Dao 2023 (FlashAttention-2), section 3.

    Backward: dq in fp32, and dk, dv for every query head before they are summed over groups
    (``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``, mha_varlen_bwd).
    """
    log_sums = Value(recorder.tokens * attention.heads, FP32, learns=False)
    expanded = 2 * recorder.width * query.elements if attention.heads != attention.key_value_heads else 0
    return recorder.tape.record(
        query,
        key,
        value,
        elements=query.elements,
        width=recorder.width,
        saves=(query, key, value, log_sums),
        saves_output=True,
        backward_workspace=FP32 * query.elements + expanded,
    )


def _repeated(recorder: LayerRecorder, x: Value, attention: Attention) -> Value:
    """Keys and values copied for each query head of their group."""
    if attention.heads == attention.key_value_heads:
        return x
    return recorder.tape.record(
        x, elements=recorder.tokens * attention.heads * attention.head_dim, width=recorder.width
    )


def _packed_rows(recorder: LayerRecorder, attention: Attention, query: Value, key: Value, value: Value) -> Value:
    """As with flash, keys and values repeated for their groups, and the output a second time where rows are joined.

    On a CPU, in fp32, and where scores are dropped (``qlora_trainer.model.device.attention.packed_attention``).
    A row longer than the sliding window brings a mask of its length squared.
    """
    key, value = _repeated(recorder, key, attention), _repeated(recorder, value, attention)
    window = attention.sliding_window
    masks = [
        Value(row * row, recorder.width, learns=False)
        for row in recorder.setting.rows
        if window is not None and row > window
    ]
    log_sums = Value(recorder.tokens * attention.heads, FP32, learns=False)
    rows = recorder.tape.record(
        query,
        key,
        value,
        elements=query.elements,
        width=recorder.width,
        saves=(query, key, value, log_sums, *masks),
        saves_output=True,
    )
    joined = recorder.tape.record(rows, elements=query.elements, width=recorder.width)
    return recorder.tape.record(joined, elements=query.elements, width=recorder.width)


def _masked(recorder: LayerRecorder, attention: Attention, query: Value, key: Value, value: Value) -> Value:
    """``sdpa`` with a mask: q, k, v repeated for their groups, output, log-sum-exp, w·T² for each layer's mask.

    transformers.integrations.sdpa_attention; ``convert_boolean_attn_mask`` makes the additive mask in every call.
    """
    key, value = _repeated(recorder, key, attention), _repeated(recorder, value, attention)
    mask = Value(recorder.tokens * recorder.tokens, recorder.width, learns=False)
    log_sums = Value(recorder.tokens * attention.heads, FP32, learns=False)
    out = recorder.tape.record(
        query,
        key,
        value,
        elements=query.elements,
        width=recorder.width,
        saves=(query, key, value, mask, log_sums),
        saves_output=True,
    )
    if attention.fused is None:
        return out
    return recorder.tape.record(out, elements=query.elements, width=recorder.width)  # Phi 3's layout has it copied


def _eager(recorder: LayerRecorder, attention: Attention, query: Value, key: Value, value: Value) -> Value:
    """Scores written out, H heads: q, k, v and (w + 4 + w)·H·T² for tanh, softmax in fp32 and probabilities.

    transformers' gemma2.eager_attention_forward.
    """
    key, value = _repeated(recorder, key, attention), _repeated(recorder, value, attention)
    cells = attention.heads * recorder.tokens * recorder.tokens
    scores = recorder.product(query, key, cells)
    scaled = recorder.tape.record(scores, elements=cells, width=recorder.width)
    capped = recorder.tape.record(scaled, elements=cells, width=recorder.width, saves_output=True)
    masked = recorder.tape.record(capped, elements=cells, width=recorder.width, workspace=recorder.width * cells)
    wide = masked if recorder.width == FP32 else recorder.tape.record(masked, elements=cells, width=FP32)
    product = FP32 * cells if recorder.setting.cuda else 0  # grad · output, in ATen's cuda/SoftMax.cu
    softmax = recorder.tape.record(wide, elements=cells, width=FP32, saves_output=True, backward_workspace=product)
    weights = (
        softmax
        if recorder.width == FP32
        else recorder.tape.record(softmax, elements=cells, width=recorder.width, workspace=masked.size)
    )
    out = recorder.product(weights, value, query.elements)
    return recorder.tape.record(out, elements=query.elements, width=recorder.width)  # contiguous


def mask_bytes(attention: Attention, tokens: int, width: int) -> int:
    """Return the [T, T] masks that are made once for all layers.

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
