"""The language model of a base whose class also takes images or sound: its configuration and its tensors.

The same decision as ``qlora_trainer.model.composite``: the language model is what has the input embeddings, and the
towers beside it are not loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_memory.shape.safetensors_headers import TensorInfo

_EMBEDDINGS = "embed_tokens.weight"
_HEAD = re.compile(r"^(?:.*\.)?lm_head\.(?P<part>weight|bias)$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_INSIDE = ("text_config", "llm_config")
_TOWERS = ("vision_config", "audio_config")
_HEAD_IN_LANGUAGE_MODEL = frozenset({"llama4_text"})
"""Model types whose class has the head inside, so that its names are those of older checkpoints."""


@dataclass(frozen=True)
class TextPart:
    """The language model of a base."""

    config: Mapping[str, Any]
    """Configuration of the language model; what it leaves out is taken from the whole."""
    tensors: Mapping[str, TensorInfo] | None
    """By the names that transformers gives them."""
    body: str | None
    """Name of the module that has the decoder layers; None: as in a class for text alone."""


def text_part(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo] | None) -> TextPart:
    """Return the language model of a base, which is the whole base where there is nothing else.

    Args:
        config: the parsed ``config.json``.
        tensors: from all headers.

    """
    inner = next((config[key] for key in _INSIDE if isinstance(config.get(key), Mapping)), None)
    if inner is None and not any(isinstance(config.get(key), Mapping) for key in _TOWERS):
        return TextPart(config, tensors, None)
    own: dict[str, Any] = {**config, **(inner or {})}
    if inner is not None and "tie_word_embeddings" in config:
        own["tie_word_embeddings"] = config["tie_word_embeddings"]  # the head is of the whole
    on_disk = next((n.removesuffix(_EMBEDDINGS) for n in tensors or () if n.endswith(f".{_EMBEDDINGS}")), None)
    body = _body(str(own.get("model_type", "")), on_disk)
    if tensors is None or on_disk is None:
        return TextPart(own, tensors, body)
    named = {}
    for name, tensor in tensors.items():
        if head := _HEAD.match(name):
            named[f"lm_head.{head['part']}"] = tensor
        elif name.startswith(on_disk) and not _is_beside(name, on_disk):
            named[f"{body}.{name.removeprefix(on_disk)}"] = tensor
    return TextPart(_with_sizes(own, named), named, body)


def _with_sizes(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Mapping[str, Any]:
    """Return a configuration with the sizes that it leaves to its class, as far as tensors tell them."""
    found: dict[str, int] = {}
    shapes = {".".join(name.rsplit(".", 3)[-3:]): tensor.shape for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name.endswith(_EMBEDDINGS):
            found["vocab_size"], found["hidden_size"] = tensor.shape
    numbers = [int(match[1]) for name in tensors if (match := _LAYER.search(name))]
    found["num_hidden_layers"] = max(numbers, default=-1) + 1
    head_dim = config.get("head_dim") or (shapes.get("self_attn.q_norm.weight") or (0,))[0]
    for key, projection in (("num_attention_heads", "q_proj"), ("num_key_value_heads", "k_proj")):
        if head_dim and (shape := shapes.get(f"self_attn.{projection}.weight")):
            found[key] = shape[0] // head_dim
    if head_dim:
        found["head_dim"] = head_dim
    return {**config, **{key: value for key, value in found.items() if config.get(key) is None and value}}


def _body(model_type: str, on_disk: str | None) -> str:
    if model_type in _HEAD_IN_LANGUAGE_MODEL:
        return "language_model.model"
    if on_disk is None or on_disk in ("model.", "language_model.model."):
        return "model.language_model"
    return on_disk.removesuffix(".")


def _is_beside(name: str, prefix: str) -> bool:
    """Return whether a tensor is of a tower that lies beside the embeddings."""
    return bool(re.match(r"(visual|vision\w*|audio\w*|multi_modal\w*|embed_vision|embed_audio)\.", name[len(prefix) :]))
