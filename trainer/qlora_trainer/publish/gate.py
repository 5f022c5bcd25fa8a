"""The publish gate: what an adapter must be before it gets a manifest.

Complete, finite, trained, of its base, no worse than its base, and such that a server loads it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from qlora_trainer.errors import AdapterRejectedError
from qlora_trainer.model.trained_tokens import TRAINED_ROWS
from qlora_trainer.publish.vllm_rules import misplaced_layer, vllm_problem
from qlora_trainer.storage.model_files import ModelFilesError, check_weights, is_tokenizer_file, safetensors_header

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qlora_api.spec import LoRASpec

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MERGED_SHARE, MERGED_NATS = 0.01, 0.01
"""Allowed increase of a merged model's loss, relative and in nats. Rounding increased it by 0.001 %
(docs/fidelity.md)."""
_PART = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.weight)?$")


def verify_adapter(folder: Path, base_names: Iterable[str] | None = None, lora: LoRASpec | None = None) -> None:
    """Check an adapter in PEFT's layout: complete, finite, trained, servable, and with its tokenizer.

    Args:
        folder: adapter_model.safetensors, adapter_config.json and the tokenizer's files.
        base_names: names of the base's modules and parameters, or of its parameters alone. With them, every layer and
            parameter that the configuration targets must have its pair, and no pair may belong to a layer that the base
            lacks. Without them, every target must have at least one.
        lora: what the job asked for. With it, the layout is checked by the rules of vLLM's loader.

    Raises:
        AdapterRejectedError: the first thing that is wrong.

    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise AdapterRejectedError(f"the adapter has no {name}")
    if not any(is_tokenizer_file(p.name) for p in folder.iterdir()):
        raise AdapterRejectedError("the adapter has no tokenizer files beside it")
    config = lora_config(folder)
    try:
        safetensors_header(folder / WEIGHTS)
        sides = _check_tensors(folder / WEIGHTS)
    except (ModelFilesError, SafetensorError) as error:
        raise AdapterRejectedError(f"the adapter {error}") from error
    _check_pairs(sides, config)
    _check_tokens(folder / WEIGHTS, config, lora)
    names = None if base_names is None else set(base_names)
    if problem := misplaced_layer(sides.keys(), names or ()):
        raise AdapterRejectedError(f"vLLM would not apply the adapter: {problem}")
    _check_targets(config, set(sides), names)
    if lora is not None:
        _check_layout(folder, lora)


def verify_loads(folder: Path, skeleton: Any) -> None:
    """Load an adapter onto its base as PEFT does, weights of the base aside: every tensor has its place and shape.

    Args:
        folder: with the adapter.
        skeleton: the base's architecture on the meta device; PEFT changes it.

    Raises:
        AdapterRejectedError: something is missing, left over or of another shape.

    """
    check_loads(lora_config(folder), load_file(folder / WEIGHTS), skeleton)


def check_loads(config: Any, tensors: dict[str, torch.Tensor], skeleton: Any) -> None:
    """Load tensors onto a base as PEFT does.

    Args:
        config: of the adapter.
        tensors: by PEFT's names; they may be without contents.
        skeleton: the base's architecture on the meta device; PEFT changes it.

    Raises:
        AdapterRejectedError: something is missing, left over or of another shape.

    """
    config.base_model_name_or_path = None  # a skeleton has no name that PEFT could compare it with
    with torch.device("meta"):
        model = get_peft_model(skeleton, config)
    try:
        left = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())
        raise AdapterRejectedError(f"the adapter cannot be loaded onto its base: {text}") from error
    missing = [name for name in left.missing_keys if "lora_" in name]
    for what, names in (("has no weights for", missing), ("has weights that belong nowhere:", left.unexpected_keys)):
        if names:
            raise AdapterRejectedError(f"the adapter {what} {names[0]} when it is loaded onto its base")


def verify_gain(base_loss: float | None, loss: float | None, *, may_be_worse: bool) -> None:
    """Refuse an adapter that is worse than its base on the evaluation rows.

    Args:
        base_loss: of the base, before the first step; None where there are no such rows.
        loss: of what is to be published.
        may_be_worse: ``spec.output.allowWorseEval``.

    Raises:
        AdapterRejectedError: it is worse, and that is not allowed.

    """
    if loss is not None and not math.isfinite(loss):
        raise AdapterRejectedError(f"the adapter's loss on the evaluation rows is {loss}")
    if base_loss is not None and loss is not None and loss > base_loss and not may_be_worse:
        raise AdapterRejectedError(
            f"the adapter's loss on the evaluation rows is {loss:.6g}, and the base's is {base_loss:.6g}: the training "
            "made it worse. A smaller spec.training.learningRate, more rows, or evaluation rows that resemble the "
            "training rows are the usual remedies; spec.output.allowWorseEval publishes it all the same"
        )


def verify_merged_loss(adapter_loss: float, merged_loss: float) -> None:
    """Refuse a merged model that is worse than the adapter on its base, both in 16 bits, on the same rows.

    Raises:
        AdapterRejectedError: it is worse by more than rounding to 16 bits makes.

    """
    if not merged_loss <= adapter_loss * (1 + MERGED_SHARE) + MERGED_NATS:  # not a number either
        raise AdapterRejectedError(
            f"the merged model's loss on some rows is {merged_loss:.6g}, and the adapter's on its base is "
            f"{adapter_loss:.6g}: merging has made it worse. With spec.output.merge None the adapter alone is published"
        )


def _check_layout(folder: Path, lora: LoRASpec) -> None:
    config = json.loads((folder / CONFIG).read_text())
    names = set(safetensors_header(folder / WEIGHTS))
    problem = vllm_problem(config, names, [p.name for p in folder.iterdir()], lora)
    if problem is not None:
        raise AdapterRejectedError(f"vLLM would not load the adapter: {problem}")


def verify_merged(folder: Path) -> None:
    """Check that a merged model's files are there and whole.

    Raises:
        AdapterRejectedError: the first thing that is wrong.

    """
    try:
        check_weights(folder)
    except ModelFilesError as error:
        raise AdapterRejectedError(f"the merged model {error}") from error


def lora_config(folder: Path) -> Any:
    """Read an adapter's configuration.

    Raises:
        AdapterRejectedError: PEFT cannot read it, or it is of another kind, which might name further files.

    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterRejectedError(f"the adapter's {CONFIG} cannot be read by PEFT: {error}") from error
    if not isinstance(config, LoraConfig):
        raise AdapterRejectedError(f"the adapter's {CONFIG} is of type {config.peft_type}, not LORA")
    return config


def _check_tensors(path: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Look at every tensor once: module → side ("A", "B") → shape."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    trained = False
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 it is no dictionary
            tensor = file.get_tensor(name)
            if tensor.numel() == 0:
                raise AdapterRejectedError(f"the adapter's {name} is empty")
            if not bool(tensor.isfinite().all()):
                raise AdapterRejectedError(f"the adapter's {name} is not finite")
            if match := _PART.match(name):
                # The embedding's pair is stored transposed: A is rank by rows.
                sides.setdefault(match["module"], {})[match["side"]] = tuple(tensor.shape)
                trained = trained or (match["side"] == "B" and bool(tensor.any()))
    if not sides:
        raise AdapterRejectedError(f"the adapter's {WEIGHTS} holds no LoRA tensors")
    if not trained:
        raise AdapterRejectedError("every B of the adapter is zero: it was never trained, and would change nothing")
    return sides


def _check_pairs(sides: dict[str, dict[str, tuple[int, ...]]], config: Any) -> None:
    rank = config.r
    for module, pair in sides.items():
        if missing := {"A", "B"} - pair.keys():
            raise AdapterRejectedError(f"the adapter has no lora_{missing.pop()} for {module}")
        if pair["A"][0] != pair["B"][1]:
            raise AdapterRejectedError(f"A and B of {module} have ranks {pair['A'][0]} and {pair['B'][1]}")
        # The pairs of all experts of a layer are one pair, of as many ranks.
        if pair["A"][0] != rank and (pair["A"][0] % rank or not config.target_parameters):
            raise AdapterRejectedError(f"{module} has rank {pair['A'][0]}, and the adapter's {CONFIG} says {rank}")


def _check_tokens(path: Path, config: Any, lora: LoRASpec | None) -> None:
    """Compare the trained embeddings of tokens with what the configuration, and the job, name."""
    found = [tuple(t["shape"]) for name, t in safetensors_header(path).items() if name.endswith(TRAINED_ROWS)]
    wanted = len(config.trainable_token_indices or ())
    if lora is not None and wanted != len(lora.train_tokens):
        raise AdapterRejectedError(f"the adapter trains {wanted} tokens, and the job names {len(lora.train_tokens)}")
    if [shape[0] for shape in found] != [wanted] * bool(wanted):
        shown = ", ".join(map(str, found)) or "none"
        raise AdapterRejectedError(f"the adapter names {wanted} trained tokens, and its embeddings are {shown}")


def _wrapped_modules(base_names: set[str], endings: tuple[str, ...]) -> set[str]:
    """Return the modules that PEFT wraps to adapt their parameters: one inside the other where there are several."""
    owners = Counter(name.rpartition(".")[0] for name in base_names if f".{name}".endswith(endings))
    return {owner + ".base_layer" * depth for owner, count in owners.items() for depth in range(count)}


def _check_targets(config: Any, adapted: set[str], base_names: Iterable[str] | None) -> None:
    if base_names is not None:
        names = set(base_names)
        parameters = tuple(f".{name}" for name in config.target_parameters or ())
        wrapped = _wrapped_modules(names, parameters)
        base = {re.sub(r"\.(weight|bias)$", "", name) for name in names} | wrapped
        if strange := sorted(adapted - base):
            raise AdapterRejectedError(f"the adapter has weights for {strange[0]}, which the base lacks")
        layers = {name for name in base if not f".{name}".endswith(parameters)}
        targeted = wrapped | {name for name in layers if check_target_module_exists(config, name)}
        if bare := sorted(targeted - adapted):
            raise AdapterRejectedError(f"the adapter has no weights for {bare[0]}, which its configuration targets")
    elif isinstance(config.target_modules, set):
        for target in sorted(config.target_modules):
            if not any(name == target or name.endswith(f".{target}") for name in adapted):
                raise AdapterRejectedError(
                    f"the adapter has no weights for any {target}, which its configuration targets"
                )
