"""Tiny bases of classes that wrap a language model, with random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qlora_trainer.model.composite import model_class
from testing.shared import shared_folder
from tiny_models import save_random

TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
GRIDS: dict[str, Any] = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
ROUTED: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "patch_size": 14,
}
DEEP_VISION: dict[str, Any] = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
COMPOSITES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({**TEXT, "sliding_window": 16}, {**VISION, "model_type": "siglip_vision_model"}),
    "gemma4": (
        {
            **TEXT,
            "sliding_window": 16,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
        },
        {**VISION, "model_type": "gemma4_vision", "head_dim": 16, "num_key_value_heads": 2},
    ),
    "llama4": (
        {
            **TEXT,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 256,
        },
        {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "mistral3": ({**TEXT, "model_type": "mistral"}, {**VISION, "model_type": "pixtral", "head_dim": 16}),
    "ministral3": ({**TEXT, "model_type": "ministral3"}, {**VISION, "model_type": "pixtral", "head_dim": 16}),
    "qwen2_vl": (GRIDS, {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}),
    "qwen2_5_vl": (GRIDS, QWEN_VISION),
    "qwen3_vl": (GRIDS, DEEP_VISION),
    "qwen3_vl_moe": ({**GRIDS, **ROUTED}, DEEP_VISION),
    "qwen3_5": ({**GRIDS, **LINEAR}, {**QWEN_VISION, "num_position_embeddings": 16}),
    "qwen3_5_moe": (
        {**GRIDS, **LINEAR, **ROUTED, "shared_expert_intermediate_size": 32},
        {**QWEN_VISION, "num_position_embeddings": 16},
    ),
    "glm4v": (GRIDS, {**QWEN_VISION, "image_size": 28}),
    "glm4v_moe": (
        {
            **GRIDS,
            **ROUTED,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {**GRIDS["rope_parameters"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
        },
        {**QWEN_VISION, "image_size": 28},
    ),
}
"""Configurations of the language model and of the tower, by model type."""
TYPE = {"ministral3": "mistral3"}
"""Model type of the whole, where its language model has given the name."""


@pytest.fixture(scope="session")
def composites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder with bf16 safetensors for each class."""
    torch.set_num_threads(1)
    folder = shared_folder(tmp_path_factory, "composites", _save)
    return {name: folder / name for name in COMPOSITES}


def _save(folder: Path) -> None:
    for name in COMPOSITES:
        save_composite(folder / name, name)


def save_composite(folder: Path, name: str, **changes: Any) -> None:
    """Write a base of the class that the Hub has for a model type; ``changes`` are of its language model."""
    torch.manual_seed(0)
    text, vision = copy.deepcopy(COMPOSITES[name])  # configurations change what they are given
    config = AutoConfig.for_model(TYPE.get(name, name), text_config={**text, **changes}, vision_config=vision)
    model = model_class(config)._from_config(config, dtype=torch.bfloat16)
    save_random(model, folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Tiny"}')
