"""Read the shape of a base model from its ``config.json`` and its safetensors headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_memory.shape.model_families import FAMILIES, ModelConfig, _known, _must_agree
from qlora_memory.shape.model_shape import ModelShape
from qlora_memory.shape.on_disk import dequantized, on_disk
from qlora_memory.shape.safetensors_headers import TensorInfo
from qlora_memory.shape.text_part import text_part
from qlora_memory.shape.unknown_models import WeightCounts, shape_of_counts, shape_of_tensors


def model_shape(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo] | None = None, source: str | None = None
) -> ModelShape:
    """Return the shape of the base whose ``config.json`` and tensors these are.

    Args:
        config: the parsed ``config.json``.
        tensors: from the headers of all its safetensors files; None: the configuration alone.
        source: of the base, by which errors name another.

    Raises:
        FieldError: the configuration lacks a size, contradicts the tensors, or is of a type that is not known here
            while no tensors are given.

    """
    quantized = on_disk(config, source)
    part = text_part(config, dequantized(config, tensors))
    read = ModelConfig(part.config)
    family = FAMILIES.get(read.model_type)
    if family is None:
        return shape_of_tensors(read, part.tensors, quantized)
    if part.body is not None:
        family = replace(family, body=family.body.replace("model", part.body, 1))
    shape = _known(read, family, quantized)
    if part.tensors:
        _must_agree(shape, part.tensors)
    return shape


def counted_shape(config: Mapping[str, Any], counts: WeightCounts) -> ModelShape:
    """Return the shape of a base whose weights were counted on the model itself.

    Args:
        config: the parsed ``config.json``.
        counts: of the weights as they are trained.

    Raises:
        FieldError: no layer has a number.

    """
    return shape_of_counts(ModelConfig(text_part(config, None).config), counts, exact=True)


def is_known(config: Mapping[str, Any]) -> bool:
    """Return whether the language model of a base is of a type that is known here."""
    return text_part(config, None).config.get("model_type") in FAMILIES
