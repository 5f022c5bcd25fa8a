"""Shrink the configuration of a model to a toy's, by what its keys mean and not by its type."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 512
"""Tokens that a toy is tried with; those of a tokenizer beside it."""
EMBEDDINGS = 640
"""Rows of the toy's embeddings: those behind the tokenizer's are for tokens of images and the like."""
HIDDEN, HEADS, HEAD_DIM = 64, 4, 16
LAYERS = 2
LAYERS_OF_MANY_KINDS = 4
MOST_LAYERS = 16
"""Maximum number of layers of a toy, for a model with more kinds of layers than any known one."""

SIZES: tuple[tuple[str, int], ...] = (
    (r"(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|hidden_dim|model_dim|word_embed_proj_dim)", HIDDEN),
    (r"(lru_width|rnn_hidden_size|attention_hidden_size|out_hidden_size|projection_dim|projector_dim)", HIDDEN),
    (r"(text_dim|input_dim|output_dim|llm_hidden_size|input_hidden_size|hidden_sizes?_out|language_dim)", HIDDEN),
    (r"hidden_size_per_layer_input|embedding_dim|d_embed|text_embed_dim|proj_dim", 32),
    (r"(moe|expert|shared_expert|moe_shared_expert)\w*(intermediate|ffn_hidden|hidden|ffn)_(size|dim)", 32),
    (r"(intermediate_size|ffn_dim|n_inner|d_ff|mlp_dim|ffn_hidden_size|feed_forward_dim)(_mlp|_moe)?", 128),
    (r"(encoder|decoder)_ffn_dim|mamba_d_ssm|mamba_intermediate_size|ff_dim|mlp_hidden_size|d_inner|inner_size", 128),
    (r"(num_attention_heads|n_heads?|num_heads|(encoder|decoder)_attention_heads|num_linear_heads)", HEADS),
    (r"(swa_|global_|cross_)?num_attention_heads|(swa|global)_num_\w*heads", HEADS),
    (r"linear_(key_|value_)?head_dim", HEAD_DIM),
    (r"linear_num_heads", HEADS),
    (r"(swa_|global_|local_|index_|full_)?(qk_)?head_dim|(swa_|full_)?v_head_dim", HEAD_DIM),
    (r"d_kv|attention_head_dim|attention_head_size|kv_channels|mamba_d_head|mamba_head_?dim|dim_head", HEAD_DIM),
    (r"rotary_dim|qk_rope_head_dim|qk_nope_head_dim", 8),
    (r"linear_num_key_heads|index_n_heads|num_index_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"mamba_(n|num)_heads|n_mamba_heads", 8),
    (r"q_lora_rank", 32),
    (r"kv_lora_rank|o_lora_rank|\w+_lora_rank", 16),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_dt_rank|time_step_rank|mamba_state_dim", 16),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"mamba_chunk_size|chunk_size|chunk_length|attention_chunk_size|\w*sliding_window|\w*window_size", 16),
    (r"(num_local|num|n_routed|moe_num|num_routed)_experts|n_experts|moe_num_expert|num_zero_experts?", 8),
    (r"zero_expert_num", 4),
    (r"n_groups?|topk_group|num_expert_group|n_limited_groups", 1),
    (r"\w*vocab(_size)?\w*", EMBEDDINGS),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len(gth)?|max_sequence_length|seq_length|max_length", 256),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"index_topk", 256),
    (r"(\w+_)?image_size|input_size|(\w+_)?img_size|crop_size", 32),
    (r"patch_size", 8),
    (r"(num|n)_filters", 4),
    (r"hidden_size_\w+|\w+_hidden_size|\w+_(in|out)put_dim", HIDDEN),
    (r"\w+_layer_(period|interval|frequency|freq)", 2),
    (r"\w+_layer_offset", 1),
)
"""Keys by what they mean, as a pattern of the whole key, and the size in a toy."""
LAYER_COUNT = re.compile(
    r"num_hidden_layers|n_layers?|num_layers(_per_stack)?|depth|(encoder|decoder)_layers|num_(en|de)coder_layers"
)
FEW = re.compile(r"(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|experts_per_token|moe_top_k)")
PAIRS = re.compile(r"(num_key_value_heads|num_kv_heads|n_head_kv|\w+_num_key_value_heads)")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER_INDICES = re.compile(r"\w*(layer|layers)_(ids?|idx|idxs|indices|indexes)|mlp_only_layers")
MISSING: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "num_experts": 8,
}
"""Values of keys that a type's configuration class leaves open and its model needs."""
TOKEN = re.compile(r"\w*token_(id|index)")


def shrunk(values: dict[str, Any], *, tokens: list[int] | None = None) -> dict[str, Any]:
    """Return the values of a configuration, with those of others inside, as they are in a toy."""
    tokens = tokens if tokens is not None else list(range(EMBEDDINGS - 1, VOCABULARY, -1))
    layers = next((values[k] for k in LAYER_COUNTS if _is_number(values.get(k))), 0)
    by_layer = {k: v for k, v in values.items() if isinstance(v, list) and layers > 1 and len(v) == layers}
    by_layer = {k: v for k, v in by_layer.items() if len({str(i) for i in v}) < max(3, layers // 2)}
    chosen = _chosen(list(by_layer.values()), layers)
    indices = {
        k for k, v in values.items() if LAYER_INDICES.fullmatch(k) and isinstance(v, list) and all(map(_is_number, v))
    }
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key == "per_layer_config" and value:
            made[key] = {n: shrunk(value[i]) for n, layer in enumerate(chosen) for i in value if int(i) == layer}
        elif isinstance(value, dict) and all(isinstance(k, str) for k in value):
            made[key] = _rope(value) if "rope" in key else shrunk(value, tokens=tokens)
        elif key in indices and chosen:
            made[key] = [n for n, layer in enumerate(chosen) if layer in value]
        elif key in by_layer:
            made[key] = [_number(key, v, values, 0, []) if _is_number(v) else v for v in (value[i] for i in chosen)]
        elif value is None and key in MISSING:
            made[key] = MISSING[key]
        elif _is_number(value):
            made[key] = _number(key, value, values, len(chosen), tokens)
        else:
            made[key] = value
    return made


def _number(key: str, value: int, values: dict[str, Any], layers: int, tokens: list[int]) -> int:
    if TOKEN.fullmatch(key):
        return value if value < VOCABULARY else tokens.pop()
    if FEW.fullmatch(key):
        return min(value, 2)
    if PAIRS.fullmatch(key):
        heads = [values.get(k) for k in ("num_attention_heads", "n_head", "num_heads")]
        return HEADS if value in heads else min(value, 2)
    if value <= 1:
        return value
    rotated = values.get("qk_rope_head_dim")
    if key == "head_dim" and rotated and value != rotated + (values.get("qk_nope_head_dim") or 0):
        key = "qk_rope_head_dim"  # it names the rotated part alone
    if LAYER_COUNT.fullmatch(key):
        return layers if "layer" in key else LAYERS
    for pattern, size in SIZES:
        if re.fullmatch(pattern, key):
            return min(size, value) if "token" in key else size
    return value


def _chosen(lists: list[list[Any]], layers: int) -> list[int]:
    """Return some layers that have every kind that is in any of the lists."""
    kinds = {(n, str(kind)) for n, values in enumerate(lists) for kind in values}
    if len(kinds) == len(lists):
        return list(range(LAYERS))
    found: list[int] = []
    while len(found) < MOST_LAYERS and (
        missing := kinds - {(n, str(values[i])) for n, values in enumerate(lists) for i in found}
    ):
        found.append(max(range(layers), key=lambda i: sum((n, str(v[i])) in missing for n, v in enumerate(lists))))
    rest = [i for i in range(layers) if i not in found]
    return sorted(found + rest[: max(0, LAYERS_OF_MANY_KINDS - len(found))])


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    if not values:
        return {"rope_type": "default", "rope_theta": 10000.0}
    made: dict[str, Any] = {k: _rope(v) if isinstance(v, dict) else v for k, v in values.items()}
    if "mrope_section" in made:
        half = int(HEAD_DIM * float(made.get("partial_rotary_factor") or 1)) // 2
        rest = half // 3
        made["mrope_section"] = [half - 2 * rest, rest, rest]
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
