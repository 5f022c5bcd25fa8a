"""Load a base's weights from its folder, dequantized on the way where they are MXFP4 or FP8 on disk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from qlora_memory.shape.on_disk import method_of
from qlora_trainer.model.composite import trained_class
from qlora_trainer.model.loading.disk_tensors import DiskTensors
from qlora_trainer.model.loading.hf_quantizers import FourBitConfig
from qlora_trainer.storage.model_files import CONFIG, GENERATION_CONFIG, weight_files

if TYPE_CHECKING:
    from pathlib import Path


def method_on_disk(path: Path) -> str | None:
    """Return the name of the method by which a base is quantized, where it is dequantized as it is read."""
    return method_of(json.loads((path / CONFIG).read_bytes()))


def notes_of(path: Path) -> list[str]:
    """Return what is worth saying of a base's weights."""
    method = method_on_disk(path)
    return [] if method is None else [f"the base is in {method} on disk: its weights are dequantized as they are read"]


def disk_tensors(path: Path, dtype: torch.dtype) -> DiskTensors:
    """Return the tensors of a base, as they are read."""
    found = json.loads((path / CONFIG).read_bytes()).get("quantization_config") or {}
    block = tuple(found.get("weight_block_size") or (128, 128))
    return DiskTensors([str(file) for file in weight_files(path)], dtype, block)


def load_weights(path: Path, config: Any, dtype: torch.dtype | None, device: torch.device | str, **options: Any) -> Any:
    """Load a base as it is trained.

    Args:
        path: of the base.
        config: its configuration, without a quantization of which nothing is left once it is read.
        dtype: of what is not quantized; None: as on disk, and bf16 for what is dequantized.
        device: where to.
        options: of ``from_pretrained``.

    """
    kind = trained_class(config)
    options["device_map"] = {"": device}
    if method_on_disk(path) is None:
        options["dtype"] = dtype or "auto"
        return kind.from_pretrained(path, use_safetensors=True, trust_remote_code=False, **options)
    options["dtype"] = dtype or torch.bfloat16
    tensors = disk_tensors(path, options["dtype"])
    if isinstance(wanted := options.get("quantization_config"), FourBitConfig):
        wanted.tensors = tensors
    model = kind.from_pretrained(None, config=config, state_dict=tensors.as_dict(), **options)
    model.config.name_or_path = str(path)
    if (path / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model
