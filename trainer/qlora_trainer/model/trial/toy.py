"""A toy of a base: a model of its class with few and small layers, and random weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig

from qlora_trainer.model.composite import meta_model_of, model_class, new_model
from qlora_trainer.model.trial.shrink import shrunk

if TYPE_CHECKING:
    from pathlib import Path

SMALL = 1 << 22
"""Elements of a base that is tried as it is."""
LARGEST = 1 << 24
"""Elements of a toy. A configuration with more has sizes of its own that were not shrunk."""
DEVIATION = 0.15
"""Standard deviation of the weights: larger than the usual 0.02, so that attention and routers are far from uniform."""


class NoToyError(Exception):
    """No toy can be made of a configuration."""


def toy_config(config: Any) -> Any:
    """Return a configuration of the same class for a toy.

    Raises:
        NoToyError: the configuration cannot be shrunk far enough.
        Exception: what the class raises of sizes that do not go together.

    """
    found = copy.deepcopy(config)
    if _elements(found) > SMALL:
        values = shrunk(config.to_dict())
        found = type(config).from_dict({k: v for k, v in values.items() if k != "quantization_config"})
        if (size := _elements(found)) > LARGEST:
            raise NoToyError(f"it has {size:,} weights, with all that can be made smaller")
    found.__dict__.pop("quantization_config", None)
    return found


def _elements(config: Any) -> int:
    return sum(p.numel() for p in meta_model_of(config, whole=True).parameters())


def write_toy(config: Any, folder: Path) -> Any:
    """Write fp32 safetensors of a toy, and return it.

    Raises:
        NoToyError: the configuration cannot be shrunk far enough.
        Exception: what the class raises.

    """
    model = new_model(toy_config(config), whole=True, dtype=torch.float32)
    randomize(model)
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    return model


def read_toy(folder: Path, dtype: torch.dtype) -> Any:
    """Return a toy as its own class reads it."""
    config = AutoConfig.from_pretrained(folder)
    return model_class(config).from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def randomize(model: Any) -> None:
    """Give a model weights that let a gradient through, whatever its class begins with."""
    for parameter in model.parameters():
        if parameter.ndim > 1 or not parameter.any():
            parameter.normal_(std=DEVIATION)
