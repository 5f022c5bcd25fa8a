"""The adapter merged into its base: one model that needs no PEFT to be served."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

from qlora_trainer.errors import AdapterRejectedError
from qlora_trainer.model.base_model import causal_config
from qlora_trainer.model.composite import has_no_towers, text_config
from qlora_trainer.model.loading.read_weights import load_weights
from qlora_trainer.publish.gate import CONFIG, WEIGHTS, lora_config, verify_merged_loss
from qlora_trainer.publish.tower_files import copy_towers

SHARD_SIZE = "5GB"


def load_unquantized(path: Path) -> Any:
    """Return the base in 16 bits on the CPU; one that is quantized on disk is dequantized."""
    config = causal_config(path)
    model = load_weights(path, config, torch.bfloat16, "cpu")
    vars(model.config).pop("auto_map", None)  # the code is not there, and never was run
    return model.dequantize() if hasattr(config, "quantization_config") else model


def load_adapter(model: Any, folder: Path) -> Any:
    """Put a LoRA adapter on its base, from its safetensors and its configuration: PEFT sees no other file.

    Raises:
        AdapterRejectedError: one of them is missing, or it is no LoRA adapter.

    """
    with tempfile.TemporaryDirectory(prefix="qlora-adapter-") as name:
        own = Path(name)
        for file in (WEIGHTS, CONFIG):
            if not (folder / file).is_file():
                raise AdapterRejectedError(f"{folder}: the adapter has no {file}")
            shutil.copyfile(folder / file, own / file)
        config = lora_config(own)
        if has_no_towers(model) and not _excludes_any(config, model):
            config.exclude_modules = None  # of a whole model, it keeps PEFT from the towers
        return PeftModel.from_pretrained(model, own, config=config)


def _excludes_any(config: Any, model: Any) -> bool:
    pattern = config.exclude_modules
    if not isinstance(pattern, str):
        return bool(pattern)
    return any(re.fullmatch(pattern, name) for name, _ in model.named_modules())


def merge(base: Path, adapter: Path, folder: Path, loss_of: Callable[[Any], float] | None = None) -> None:
    """Write W + (alpha / rank)·B·A of every adapted layer, and all else of the base, as bf16 safetensors shards.

    The sum is taken on the base's 16-bit weights rather than on their quantized image (docs/fidelity.md has the
    difference). Needs host memory for the base in 16 bits.

    Args:
        base: a checked base's folder.
        adapter: in PEFT's layout.
        folder: for the merged model.
        loss_of: of a model on some rows. With it, the merged model is read back and must be as good as the adapter is
            on the same 16-bit base.

    Raises:
        AdapterRejectedError: the adapter cannot be loaded, or the merged model is worse than it.

    """
    model = load_adapter(load_unquantized(base), adapter)
    untie_adapted_head(model)
    expected = loss_of(model) if loss_of else None
    model = merge_in_fp32(model)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    if has_no_towers(model):
        copy_towers(base, folder)
    del model  # before there is another of its size
    if loss_of is not None and expected is not None:
        verify_merged_loss(expected, loss_of(load_unquantized(folder)))


def merge_in_fp32(model: Any) -> Any:
    """Return the base with the adapter in its weights, each a sum in fp32 that is rounded once.

    Rows of trained tokens take the place of the base's. PEFT rounds what it adds before the sum as well. Needs memory
    for one layer in fp32, three times.
    """
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            layer.merge()
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
        dtype = weight.dtype
        weight.data = weight.data.float()
        layer.merge(safe_merge=True)
        weight.data = weight.data.to(dtype)
    return model.unload()


def untie_adapted_head(model: Any) -> None:
    """Give an adapted output head its own weights where it shares the embedding's, which stay as they are."""
    plain = model.get_base_model()
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    layer = getattr(head, "base_layer", None)  # of a layer that PEFT has wrapped
    if layer is None or layer.weight is not embedding.weight:
        return
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for config in (plain.config, text_config(plain.config)):
        config.tie_word_embeddings = False
