"""The publish gate: an adapter that is incomplete, not finite or untrained never gets a manifest."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open

from qlora_trainer.errors import AdapterRejectedError
from qlora_trainer.model_files import ModelFilesError, check_weights, is_tokenizer_file, safetensors_header

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PART = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.weight)?$")


def verify_adapter(folder: Path, base_names: Iterable[str] | None = None) -> None:
    """Check an adapter in PEFT's layout: complete, finite, trained, and with its tokenizer.

    Args:
        folder: adapter_model.safetensors, adapter_config.json and the tokenizer's files.
        base_names: names of the base's modules, or of its parameters. With them, every layer that the configuration
            targets must have its pair, and no pair may belong to a layer that the base lacks. Without them, every
            target must have at least one.

    Raises:
        AdapterRejectedError: the first thing that is wrong.

    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise AdapterRejectedError(f"the adapter has no {name}")
    if not any(is_tokenizer_file(p.name) for p in folder.iterdir()):
        raise AdapterRejectedError("the adapter has no tokenizer files beside it")
    config = _lora_config(folder)
    try:
        safetensors_header(folder / WEIGHTS)
        sides = _check_tensors(folder / WEIGHTS)
    except (ModelFilesError, SafetensorError) as error:
        raise AdapterRejectedError(f"the adapter {error}") from error
    _check_pairs(sides)
    _check_targets(config, set(sides), base_names)


def verify_merged(folder: Path) -> None:
    """Check that a merged model's files are there and whole.

    Raises:
        AdapterRejectedError: the first thing that is wrong.

    """
    try:
        check_weights(folder)
    except ModelFilesError as error:
        raise AdapterRejectedError(f"the merged model {error}") from error


def _lora_config(folder: Path) -> Any:
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


def _check_pairs(sides: dict[str, dict[str, tuple[int, ...]]]) -> None:
    for module, pair in sides.items():
        if missing := {"A", "B"} - pair.keys():
            raise AdapterRejectedError(f"the adapter has no lora_{missing.pop()} for {module}")
        if pair["A"][0] != pair["B"][1]:
            raise AdapterRejectedError(f"A and B of {module} have ranks {pair['A'][0]} and {pair['B'][1]}")


def _check_targets(config: Any, adapted: set[str], base_names: Iterable[str] | None) -> None:
    if base_names is not None:
        base = {re.sub(r"\.(weight|bias)$", "", name) for name in base_names}
        if strange := sorted(adapted - base):
            raise AdapterRejectedError(f"the adapter has weights for {strange[0]}, which the base lacks")
        if bare := sorted(name for name in base - adapted if check_target_module_exists(config, name)):
            raise AdapterRejectedError(f"the adapter has no weights for {bare[0]}, which its configuration targets")
    elif isinstance(config.target_modules, set):
        for target in sorted(config.target_modules):
            if not any(name == target or name.endswith(f".{target}") for name in adapted):
                raise AdapterRejectedError(
                    f"the adapter has no weights for any {target}, which its configuration targets"
                )
