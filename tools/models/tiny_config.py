"""Toy configurations of model types: their default one, shrunk, with the values that no key tells."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from qlora_trainer.model.trial.shrink import shrunk

_SHARED_CACHE = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _grids(half: int) -> dict[str, Any]:
    """Share half a head's dimensions among positions in time, height and width."""
    rest = half // 3
    return {"text_config": {"rope_parameters": {"mrope_section": [half - 2 * rest, rest, rest]}}}


SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "qwen2_5_omni_thinker"), _grids(8)),
    **dict.fromkeys(("glm4v", "glm46v", "glm_ocr", "glmga"), _grids(8)),
    "glm4v_moe": _grids(4),
    "gemma3n_text": _SHARED_CACHE,
    "gemma3n": {"text_config": _SHARED_CACHE},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
    },
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "mamba2": {"num_heads": 8, "head_dim": 16},
}
"""Values that no key tells, by model type."""


def tiny_config(model_type: str) -> Any:
    """Return the configuration of a toy of a model type; raise what its class raises where there is none."""
    values = AutoConfig.for_model(model_type).to_dict()
    values = shrunk(values)
    _lay_over(values, SPECIAL.get(model_type, {}))
    values.pop("model_type", None)
    return AutoConfig.for_model(model_type, **values)


def _lay_over(values: dict[str, Any], own: dict[str, Any]) -> None:
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _lay_over(values[key], value)
        else:
            values[key] = value
