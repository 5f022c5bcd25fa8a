"""The adapter merged into its base: one model that needs no PEFT to be served."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_trainer.errors import AdapterRejectedError
from qlora_trainer.publish.gate import CONFIG, WEIGHTS, lora_config

SHARD_SIZE = "5GB"


def load_unquantized(path: Path) -> Any:
    """The base in 16 bits on the CPU; one that is quantized on disk is dequantized."""
    quantized = "quantization_config" in json.loads((path / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map={"": "cpu"}, use_safetensors=True, trust_remote_code=False
    )
    return model.dequantize() if quantized else model


def load_adapter(model: Any, folder: Path) -> Any:
    """Put a LoRA adapter on its base, from its safetensors and its configuration: PEFT sees no other file.

    Raises:
        AdapterRejectedError: one of them is missing, or it is no LoRA adapter.

    """
    with tempfile.TemporaryDirectory(prefix="qlora-adapter-") as name:
        own = Path(name)
        for file in (WEIGHTS, CONFIG):
            if not (folder / file).is_file():
                raise AdapterRejectedError(f"the adapter has no {file}")
            shutil.copyfile(folder / file, own / file)
        return PeftModel.from_pretrained(model, own, config=lora_config(own))


def merge(base: Path, adapter: Path, folder: Path) -> None:
    """Write W + (alpha / rank)·B·A of every adapted layer, and all else of the base, as bf16 safetensors shards.

    The sum is taken on the base's 16-bit weights rather than on their quantized image (docs/fidelity.md has the
    difference). Needs host memory for the base in 16 bits.
    """
    model = load_adapter(load_unquantized(base), adapter)
    model.merge_and_unload(safe_merge=True).save_pretrained(folder, max_shard_size=SHARD_SIZE)
