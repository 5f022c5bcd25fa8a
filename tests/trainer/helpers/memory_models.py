"""Small models of every family that the memory model knows, with sizes that are no powers of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
LLAMA_LIKE: dict[str, Any] = {**SHAPE, "intermediate_size": 248, "num_key_value_heads": 2}
MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**LLAMA_LIKE),
    "llama-biased": LlamaConfig(**LLAMA_LIKE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**LLAMA_LIKE, sliding_window=64),
    "qwen2": Qwen2Config(**LLAMA_LIKE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA_LIKE, head_dim=40),
    "gemma": GemmaConfig(**LLAMA_LIKE, head_dim=32),
    "gemma2": Gemma2Config(**LLAMA_LIKE, head_dim=32, sliding_window=64),
    "gemma3": Gemma3TextConfig(**LLAMA_LIKE, head_dim=32, sliding_window=64),
    "opt": OPTConfig(**SHAPE, ffn_dim=384, word_embed_proj_dim=96, dropout=0.0),
    "opt-projected": OPTConfig(**SHAPE, ffn_dim=384, word_embed_proj_dim=48, dropout=0.1, do_layer_norm_before=False),
    "phi": PhiConfig(**SHAPE, intermediate_size=384),
    "phi3": Phi3Config(**LLAMA_LIKE, pad_token_id=0),
    "mixtral": MixtralConfig(**LLAMA_LIKE, num_local_experts=4),
    "qwen2-moe": Qwen2MoeConfig(**LLAMA_LIKE, **MIXTURE, shared_expert_intermediate_size=56, mlp_only_layers=[1]),
    "qwen3-moe": Qwen3MoeConfig(**LLAMA_LIKE, **MIXTURE, head_dim=40, norm_topk_prob=True),
    "wide": LlamaConfig(**{**LLAMA_LIKE, "hidden_size": 512, "intermediate_size": 1400, "num_hidden_layers": 1}),
}
"""Names hold a family; ``wide`` has layers above the size that ZeRO-3 divides."""


def save_models(folder: Path) -> None:
    """Write them all, with random bf16 weights."""
    torch.set_num_threads(1)
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
