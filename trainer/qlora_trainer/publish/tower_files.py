"""Copy towers and processor, as the base has them, beside a merged language model."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_trainer.model.base_model import meta_model
from qlora_trainer.model.composite import tower_names
from qlora_trainer.model.loading.read_weights import disk_tensors
from qlora_trainer.storage.model_files import PROCESSOR_FILES, SINGLE_WEIGHTS, WEIGHTS_INDEX, safetensors_header

if TYPE_CHECKING:
    from pathlib import Path

TOWERS = "towers.safetensors"
FIRST_SHARD = "model-00001-of-00001.safetensors"


def copy_towers(base: Path, folder: Path) -> None:
    """Add what a composite base has besides its language model to a merged model, byte by byte.

    Args:
        base: a checked base's folder.
        folder: of the merged model, as it was saved without towers.

    """
    for name in PROCESSOR_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    index = _index(folder)
    tensors = {name: tensor for name, tensor in _beside_text(base).items() if name not in index["weight_map"]}
    if not tensors:
        return
    if (folder / SINGLE_WEIGHTS).is_file():
        (folder / SINGLE_WEIGHTS).rename(folder / FIRST_SHARD)
    save_file(tensors, folder / TOWERS, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, TOWERS)
    index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _index(folder: Path) -> dict[str, Any]:
    """Return the index of a model's shards; the one that a single file would have."""
    if (folder / WEIGHTS_INDEX).is_file():
        found: dict[str, Any] = json.loads((folder / WEIGHTS_INDEX).read_bytes())
        return found
    header = safetensors_header(folder / SINGLE_WEIGHTS)
    size = sum(end - start for start, end in (entry["data_offsets"] for entry in header.values()))
    return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(header, FIRST_SHARD)}


def _beside_text(base: Path) -> dict[str, Any]:
    """Return the tensors of a base that belong to its towers, or to nothing that its class has."""
    whole = meta_model(base, whole=True)
    names = whole.state_dict()
    conversions = get_model_conversion_mapping(whole)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    towers = tuple(f"{name}." for name in tower_names(whole))
    found = {}
    tensors = disk_tensors(base, torch.bfloat16)
    for name in tensors:
        own, _ = rename_source_key(name, renamings, converters, whole.base_model_prefix, names)
        if own.startswith(towers) or own not in names:
            found[name] = tensors[name][...]
    return found
