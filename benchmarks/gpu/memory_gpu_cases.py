"""Cases of ``bench_memory_gpu.py``: bases by the values of their ``config.json``, and configurations of each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from qlora_api.spec import LoRASpec, Optimizer, ParallelismSpec, QuantizationSpec
from qlora_memory import EstimateInput, model_shape

VOCABULARY = 128256
_LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": 131072}
_SMALL: dict[str, Any] = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 16,
}
_LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
}
_FEW: dict[str, Any] = {**_SMALL, "num_hidden_layers": 8, "intermediate_size": 6144, "vocab_size": 51200}
BASES: dict[str, dict[str, Any]] = {
    "llama-1b": {**_LLAMA, **_SMALL, "intermediate_size": 8192},
    "qwen3-2b": {**_LLAMA, **_SMALL, "model_type": "qwen3", "head_dim": 128, "intermediate_size": 6144},
    "gemma-2b": {**_LLAMA, **_SMALL, "model_type": "gemma", "head_dim": 256, "intermediate_size": 16384},
    "phi-1b": {
        **_FEW,
        "model_type": "phi",
        "num_hidden_layers": 16,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "intermediate_size": 8192,
    },
    "mistral": {**_FEW, "model_type": "mistral", "sliding_window": 1024},
    "qwen2": {**_FEW, "model_type": "qwen2"},
    "opt": {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
        "word_embed_proj_dim": 2048,
        "max_position_embeddings": 8192,
        "attention_dropout": 0.0,
    },
    "gemma3": {**_FEW, "model_type": "gemma3_text", "head_dim": 128, "sliding_window": 1024},
    "gemma2": {**_FEW, "model_type": "gemma2", "head_dim": 128, "sliding_window": 1024},
    "phi3": {**_FEW, "model_type": "phi3", "pad_token_id": 0, "max_position_embeddings": 4096},
    "mixtral": {**_FEW, "model_type": "mixtral", "num_local_experts": 8, "intermediate_size": 3584},
    "llama-8b": {**_LLAMA, **_LARGE, "intermediate_size": 14336},
}
"""Names of one word have eight layers, enough for what a family does differently."""

_UNEVEN = [1500, 800, 1000, 796]
_VARIED = ("mistral", "qwen2", "opt", "gemma3", "gemma2", "phi3", "mixtral")
_CHANGES: tuple[dict[str, Any], ...] = (
    {"lora": {"rank": 64}},
    {"lora": {"dropout": "0.1"}},
    {"lora": {"targetModules": ["q_proj", "v_proj"]}},
    {"lora": {"dora": True}},
    {"quantization": {"doubleQuantization": False}},
    {"quantization": {"type": "INT8"}},
    {"quantization": {"type": "None"}},
    {"optimizer": "AdamW"},
    {"optimizer": "AdamW8Bit"},
    {"optimizer": "PagedAdamW32Bit"},
    {"parallelism": {"zeroStage": 1}},
    {"parallelism": {"zeroStage": 2}},
)


def cases() -> Iterator[dict[str, Any]]:
    """From small to large; a base in one quantization is made once where its cases follow each other."""
    for base, length, again in product(("llama-1b", "qwen3-2b", "gemma-2b", "phi-1b"), (2048, 8192), (True, False)):
        yield {"base": base, "rows": [length], "recomputes": again}
    for base, again in product(_VARIED, (True, False)):
        yield {"base": base, "rows": _UNEVEN, "recomputes": again}
    for change in ({"targets": 0.25}, *_CHANGES, {"quantization": {"computeType": "Float32"}}):
        yield {"base": "llama-1b", "rows": _UNEVEN, "recomputes": False, **change}
    for rows, again in product(([2048] * 4, [4096], [8192], [16384]), (True, False)):
        yield {"base": "llama-8b", "rows": rows, "recomputes": again}
    for change in (*_CHANGES[:2], *_CHANGES[3:6], _CHANGES[7], _CHANGES[11]):
        yield {"base": "llama-8b", "rows": [4096], "recomputes": True, **change}


def quantization_of(case: dict[str, Any]) -> QuantizationSpec:
    return QuantizationSpec.model_validate(case.get("quantization", {}))


def run_of(case: dict[str, Any]) -> EstimateInput:
    """The case as inputs of the formulas."""
    every = sum(case["rows"]) - len(case["rows"])
    return EstimateInput(
        shape=model_shape(BASES[case["base"]]),
        lora=LoRASpec.model_validate(case.get("lora", {})),
        quantization=quantization_of(case),
        optimizer=Optimizer(case.get("optimizer", "PagedAdamW8Bit")),
        parallelism=ParallelismSpec.model_validate(case.get("parallelism", {})),
        world_size=1,
        rows=tuple(case["rows"]),
        checkpointing=case["recomputes"],
        targets=int(every * case.get("targets", 1)),
    )


def change_of(case: dict[str, Any]) -> str:
    """Return what differs from the defaults, in words."""
    found = []
    for name, value in case.items():
        if name in ("base", "rows", "recomputes"):
            continue
        inner = value.items() if isinstance(value, dict) else ((name, value),)
        found += [f"{key} {' '.join(x) if isinstance(x, list) else x}" for key, x in inner]
    return ", ".join(found)
