"""Check whether vLLM's loader takes an adapter, by its own rules, without vLLM.

The rules, as of vLLM 0.11 (``vllm/lora/peft_helper.py``: ``from_dict``, ``_validate_features``, ``validate_legal``;
``vllm/lora/utils.py``: ``parse_fine_tuned_lora_name``; ``vllm/lora/models.py``: ``from_local_checkpoint``):

- ``r``, ``lora_alpha`` and ``target_modules`` stand in adapter_config.json, and one rank holds for all layers
  (``rank_pattern`` and ``alpha_pattern`` are not looked at);
- ``modules_to_save`` is not set; no DoRA; ``bias`` is "none". What the job itself asked for is its own affair: the
  model card says that such an adapter is served merged;
- every tensor is ``base_model.model.<layer>.lora_A.weight`` or ``lora_B.weight``, and every layer is one of the
  targets;
- experts are adapted as PEFT's ``target_parameters``, which that version does not know: like DoRA, such an adapter is
  served merged, and the model card says so;
- trained embeddings of tokens (PEFT's ``trainable_token_indices``) are unsupported weights (``utils.py``, vllm#36501):
  such an adapter is served merged, too;
- weights come as safetensors, without vocabulary of their own (``new_embeddings``).

Of a class that wraps a language model, vLLM 0.33 looks for layers under the name that its own class has. Names that no
rule of that class translates (``hf_to_vllm_mapper``, ``vllm/model_executor/models``) pass the check, which compares the
last part of a name alone (``vllm/lora/utils.py``, ``is_supported_lora_module``), and are applied to nothing
(``vllm/lora/model_manager.py``, ``activate_adapter``): vllm#34186, #48019, #39369. :data:`WRAPPED` has the names that
are translated.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from qlora_api.spec import LoRABias, LoRASpec

WRAPPED = {
    "model.language_model.": "language_model.model.",
    "language_model.model.": "language_model.model.",
    "model.text_model.": "model.text_model.",
}
"""Prefix of the language model's modules in transformers, with vLLM's. The first is in ``gemma3_mm.py``,
``gemma3n_mm.py``, ``gemma4_mm.py``, ``glm4_1v.py``, ``llava.py``, ``mistral3.py``, ``qwen2_vl.py``, ``qwen2_5_vl.py``
and ``qwen3_vl.py`` (with Qwen 3.5); the second in ``mllama4.py``; the third in ``idefics3.py``."""
HEAD = "lm_head"
REQUIRED = ("r", "lora_alpha", "target_modules")
_WEIGHT = re.compile(r"^base_model\.model\.(?P<layer>.+)\.lora_[AB]\.weight$")
_WRAPPED = re.compile(r"(\.base_layer)+$")
"""Suffix that PEFT adds to a module's name for each further parameter of that module."""
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.weight)?$")
_TOKENS = re.compile(r"\.token_adapter\.trainable_tokens_delta$")
_BIAS = re.compile(r"^base_model\.model\..+\.bias$")


def vllm_problem(
    config: Mapping[str, Any], names: Collection[str], files: Collection[str], lora: LoRASpec
) -> str | None:
    """Say why vLLM would not load an adapter; None where it would, or where the job asked for what it does not load.

    Args:
        config: adapter_config.json.
        names: of the tensors.
        files: in the adapter's folder.
        lora: what the job asked for.

    """
    return _config_problem(config, lora) or _name_problem(config, names, lora) or _file_problem(files)


def misplaced_layer(layers: Collection[str], base_names: Collection[str]) -> str | None:
    """Say which layer vLLM would leave out, of an adapter for a class that wraps a language model; None where none.

    Args:
        layers: that have weights.
        base_names: of the modules of the base's class.

    """
    place = next((place for place in WRAPPED if any(name.startswith(place) for name in base_names)), None)
    if place is None:
        return None
    strange = [layer for layer in sorted(layers) if not layer.startswith(place) and layer.rpartition(".")[2] != HEAD]
    if not strange:
        return None
    return f"the base has its language model at {place[:-1]}, and {strange[0]}, which is elsewhere, would be left out"


def _config_problem(config: Mapping[str, Any], lora: LoRASpec) -> str | None:
    if missing := [key for key in REQUIRED if not config.get(key)]:
        return f"its configuration has no {missing[0]}"
    if config.get("modules_to_save"):
        return f"its configuration has modules_to_save: {', '.join(config['modules_to_save'])}"
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            return f"its configuration has {key}; one rank and one alpha must hold for all layers"
    if config.get("use_dora") and not lora.dora:
        return "it uses DoRA, which spec.lora.dora does not ask for"
    if config.get("bias", "none") != "none" and lora.bias is LoRABias.NONE:
        return "it has biases, which spec.lora.bias does not ask for"
    return None


def _name_problem(config: Mapping[str, Any], names: Collection[str], lora: LoRASpec) -> str | None:
    targets = [*config["target_modules"], *_owners(config.get("target_parameters") or ())]
    for name in sorted(names):
        match = _WEIGHT.match(name)
        if match is None:
            asked_for = (
                (lora.dora and _MAGNITUDE.search(name))
                or (lora.train_tokens and _TOKENS.search(name))
                or (lora.bias is not LoRABias.NONE and _BIAS.match(name))
            )
            if not asked_for:
                return f"it holds {name}, which is no LoRA weight"
        elif not _is_target(_WRAPPED.sub("", match["layer"]), targets):
            return f"it has weights for {match['layer']}, which is not among its target_modules"
    return None


def _owners(parameters: Collection[str]) -> list[str]:
    """Return the modules whose parameters are adapted: ``experts`` for ``experts.down_proj``."""
    return [parameter.rpartition(".")[0] for parameter in parameters]


def _is_target(layer: str, targets: Collection[str]) -> bool:
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def _file_problem(files: Collection[str]) -> str | None:
    bad = sorted(f for f in files if f.startswith("new_embeddings") or f.endswith((".bin", ".pt", ".pth")))
    return f"its folder holds {bad[0]}" if bad else None
