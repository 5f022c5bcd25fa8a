"""Tiny mixtures of experts of real architectures, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from testing.shared import shared_folder
from tiny_models import save_random

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
}
FEW: dict[str, Any] = {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
MANY: dict[str, Any] = {**SHAPE, "num_experts": 8, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    **SHAPE,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    **ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**MANY, "head_dim": 16, "moe_intermediate_size": 32},
    "qwen2_moe": {**MANY, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "mixtral": FEW,
    "olmoe": MANY,
    "granitemoe": FEW,
    "phimoe": FEW,
    "gpt_oss": {
        **FEW,
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe": {**ROUTED, "head_dim": 16},
    "llama4_text": {
        **FEW,
        "head_dim": 16,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 256,
    },
}
"""By model type."""


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder with bf16 safetensors for each architecture."""
    torch.set_num_threads(1)
    folder = shared_folder(tmp_path_factory, "mixtures", _save)
    return {name: folder / name for name in MIXTURES}


def _save(folder: Path) -> None:
    for name, sizes in MIXTURES.items():
        save_mixture(folder / name, name, **sizes)


def save_mixture(folder: Path, model_type: str, **sizes: Any) -> None:
    """Write a mixture, with weights so wide that the router's choices differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes), dtype=torch.bfloat16)
    save_random(model, folder)
