"""Attention over several rows in one sequence, none of which sees another.

Rows are flattened without padding: queries, keys and values are [1, heads, T, head_dim], and ``cu_seqlens``
([rows + 1], int32) says where each row starts. On a GPU this is torch's variable-length flash attention. On a CPU, on a
GPU before Ampere, in fp32 and with dropout of scores each row is one call of scaled-dot-product attention, which is the
block-diagonal mask without building it: Σ len² instead of T².
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from qlora_trainer.model.composite import text_config
from qlora_trainer.model.device.hardware import bf16_in_hardware

PACKED = "qlora_packed"
"""Name under which transformers finds :func:`packed_attention`."""


PROVEN = frozenset({"gemma", "gemma3_text", "llama", "mistral", "opt", "phi", "qwen2", "qwen3"})
"""Model types whose attention is known to be what :func:`packed_attention` computes; each has a test."""


def register() -> None:
    """Make :data:`PACKED` known to transformers; safe to call again."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)


def choose_attention(model_class: Any, config: Any) -> str | dict[str, str]:
    """The attention implementation for a model: packed where the architecture allows it, else transformers' own masks.

    With transformers' own, rows are told apart by position ids that restart (``transformers.masking_utils``): the same
    result through a [T, T] mask. Some classes of towers know no implementation but their own: of a class with towers
    that of the language model alone is chosen.
    """
    chosen = _choose(model_class, text_config(config))
    inside = [name for name in config.sub_configs if getattr(config, name, None) is text_config(config)]
    return dict.fromkeys(inside, chosen) if chosen == PACKED and inside else chosen


def is_packed(config: Any) -> bool:
    """Return whether a model of this configuration computes attention by :func:`packed_attention`."""
    return getattr(text_config(config), "_attn_implementation", None) == PACKED


def _choose(model_class: Any, config: Any) -> str:
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "eager"  # soft-capped scores are in neither kernel
    if config.model_type not in PROVEN:
        return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
    return PACKED


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 transformers' signature; rows are in cu_seq_lens
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row.

    Args:
        module: the attention layer; its ``num_key_value_groups`` is the ratio of query to key heads.
        query: [1, H, T, D].
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D].
        attention_mask: not used.
        cu_seq_lens_q: [rows + 1] int32, starts of the rows and T.
        max_length_q: tokens of the longest row.
        scaling: of the scores; default 1/√D.
        dropout: probability that a score is dropped.
        sliding_window: tokens a query sees, itself included.

    Returns:
        [1, T, H, D], None

    """
    if query.is_cuda and query.dtype is not torch.float32 and not dropout and bf16_in_hardware(query.device):
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    lengths = cu_seq_lens_q.diff().tolist()
    # split, not slices: the backward of a slice fills a tensor of the whole sequence with zeros, one for every row
    parts = (tensor.split(lengths, dim=2) for tensor in (query, key, value))  # type: ignore[no-untyped-call]
    rows = [
        functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=(mask := _window_mask(q.shape[2], sliding_window)),
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
        )
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 fails to import without CUDA libraries

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    out: torch.Tensor = varlen_attn(  # type: ignore[assignment] # no aux is asked for
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        window_size=window,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.unsqueeze(0)


def _window_mask(length: int, sliding_window: int | None) -> torch.Tensor | None:
    """[length, length], True where a query sees a key; None when plain causality says it all."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


def _no_mask(*_: Any, **__: Any) -> None:
    """Rows are told apart by ``cu_seqlens``: no mask is built."""
