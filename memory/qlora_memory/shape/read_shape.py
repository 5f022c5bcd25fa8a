"""Read the shape of a base model from its ``config.json`` and its safetensors headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_memory.shape.model_families import FAMILIES, Config, _known, _must_agree
from qlora_memory.shape.model_shape import (
    ModelShape,
)
from qlora_memory.shape.safetensors_headers import TensorInfo
from qlora_memory.shape.unknown_models import shape_of_tensors


def model_shape(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo] | None = None) -> ModelShape:
    """The shape of the base whose ``config.json`` and tensors these are.

    Args:
        config: the parsed ``config.json``.
        tensors: from the headers of all its safetensors files; None: the configuration alone.

    Raises:
        FieldError: the configuration lacks a size, contradicts the tensors, or is of a type that is not known here
            while no tensors are given.

    """
    read = Config(config)
    family = FAMILIES.get(read.model_type)
    if family is None:
        return shape_of_tensors(read, tensors)
    shape = _known(read, family)
    if tensors:
        _must_agree(shape, tensors)
    return shape
