"""Tiny models of real architectures, made from their configurations, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from testing.shared import shared_folder

VOCABULARY = 320
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LLAMA_LIKE: dict[str, Any] = {**SHAPE, "intermediate_size": 128, "num_key_value_heads": 2}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**LLAMA_LIKE),
    "opt": OPTConfig(**SHAPE, ffn_dim=128, word_embed_proj_dim=64, dropout=0.0),
    "qwen2": Qwen2Config(**LLAMA_LIKE),
    "qwen3": Qwen3Config(**LLAMA_LIKE, head_dim=16),
    "mistral": MistralConfig(**LLAMA_LIKE, sliding_window=16),
    "gemma": GemmaConfig(**LLAMA_LIKE, head_dim=16),
    "gemma2": Gemma2Config(**LLAMA_LIKE, head_dim=16, sliding_window=16),
    "gemma3": Gemma3TextConfig(**LLAMA_LIKE, head_dim=16, sliding_window=16),
    "phi": PhiConfig(**SHAPE, intermediate_size=128),
}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with bf16 safetensors for each architecture."""
    torch.set_num_threads(1)
    folder = shared_folder(tmp_path_factory, "tiny-models", _save_models)
    return {name: folder / name for name in CONFIGS}


def _save_models(folder: Path) -> None:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        save_random(model, folder / name)


def save_random(model: PreTrainedModel, folder: Path) -> None:
    """Save a model with random weights, wider than the usual 0.02: attention and routers are far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
