"""Tell how a base is quantized on disk, and what its tensors are once they are dequantized as they are read.

The same decision as ``qlora_trainer.model.loading.disk_tensors``.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

from qlora_api.errors import FieldError
from qlora_api.spec import QuantizationSpec, QuantizationType
from qlora_memory.shape.model_shape import OnDisk
from qlora_memory.shape.safetensors_headers import TensorInfo

SOURCE = "spec.model.source"
DEQUANTIZED = {"mxfp4": "MXFP4", "fp8": "FP8"}
"""Methods, as ``quantization_config`` names them, of bases that are dequantized as they are read."""
FP8 = "F8_E"
"""Prefix of the types of FP8 weights in headers of safetensors."""
BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of MXFP4: 16 bytes of two weights each, and the exponent that these share. gpt-oss."""
FP8_SCALES = (("_scale_inv", ""), (".qscale_weight", ".weight"), (".scale", ".weight"))
"""Ends of the names of the scales of an FP8 weight, and of the weight: DeepSeek V3, Mistral, DeepSeek V4."""
UNUSED = (".activation_scale", ".input_scale", ".k_scale", ".v_scale", ".qscale_act")
"""Ends of names of scales for what is computed in 8 bits, which nothing is here."""
_SUFFIX = re.compile(
    r"(?i)([-_.](gptq|awq|marlin|w\d+a\d+|g?int[48]|[48][-_]?bits?|autoround|quantized))+([-_.]g\d+)?$"
)


def on_disk(config: Mapping[str, Any], source: str | None = None) -> OnDisk | None:
    """Return bitsandbytes' quantization that the base has on disk; None for a base that is, or is read as, 16-bit.

    Args:
        config: the parsed ``config.json``.
        source: of the base, where it is known.

    Raises:
        FieldError: by a method whose weights cannot be read.

    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping) or method_of(config):
        return None
    if found.get("quant_method") != "bitsandbytes":
        raise FieldError(SOURCE, source, _refusal(str(found.get("quant_method")), source))
    if found.get("load_in_8bit"):
        return OnDisk(QuantizationType.INT8, double=False)
    name = str(found.get("bnb_4bit_quant_type", "fp4")).upper()
    if name not in (QuantizationType.NF4, QuantizationType.FP4):
        raise FieldError(SOURCE, source, _refusal(f"bitsandbytes' {name}", source))
    return OnDisk(QuantizationType(name), bool(found.get("bnb_4bit_use_double_quant")))


def check_on_disk(found: OnDisk | None, wanted: QuantizationSpec) -> None:
    """Find out that a base is quantized on disk as the job says, or not at all.

    Args:
        found: on disk.
        wanted: of the job.

    Raises:
        FieldError: it is quantized in another way.

    """
    if found is None:
        return
    if found.type is not wanted.type:
        raise FieldError(
            "spec.quantization.type",
            wanted.type,
            f"does not match the base, which is {found.type} on disk: set {found.type}",
        )
    if found.type.is_four_bit and found.double != wanted.double_quantization:
        raise FieldError(
            "spec.quantization.doubleQuantization",
            wanted.double_quantization,
            f"does not match the base on disk: set {str(found.double).lower()}",
        )


def method_of(config: Mapping[str, Any]) -> str | None:
    """Return the name of the method by which a base is quantized that is dequantized as it is read."""
    found = config.get("quantization_config")
    return DEQUANTIZED.get(str(found.get("quant_method"))) if isinstance(found, Mapping) else None


def _refusal(method: str, source: str | None) -> str:
    """Return why a base that is quantized by ``method`` is refused, and which one to use."""
    sibling = _SUFFIX.sub("", source.partition("@")[0]) if source else None
    named = f", perhaps {sibling}" if sibling and sibling != source else ""
    return (
        f"is quantized with {method}: use the 16-bit base that it was made from{named} (of quantized ones, "
        f"{', '.join(DEQUANTIZED.values())} and bitsandbytes' own are read)"
    )


def dequantized(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo] | None) -> Mapping[str, TensorInfo] | None:
    """Return tensors by the names, shapes and types that they have once they are read.

    Raises:
        FieldError: one is in FP8 or MXFP4 and has no scales.

    """
    if tensors is None or method_of(config) is None:
        return tensors
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(BLOCKS) and len(tensor.shape) == 4:
            experts, outputs, groups, size = tensor.shape
            plain = name.removesuffix(BLOCKS)
            found[plain] = TensorInfo("BF16", (experts, groups * size * 2, outputs))
            if f"{plain}{SCALES}" not in tensors:
                raise FieldError(SOURCE, None, f"has {plain} in MXFP4 without scales: copy the model again")
        elif not (is_scale(name, tensors) or name.endswith(UNUSED)):
            found[name] = TensorInfo("BF16", tensor.shape) if tensor.dtype.startswith(FP8) else tensor
            if found[name] is not tensor and scales_of(name, tensors) is None:
                raise FieldError(SOURCE, None, f"has {name} in FP8 without scales: copy the model again")
    return found


def scales_of(name: str, names: Container[str]) -> str | None:
    """Return the name of the scales of an FP8 weight."""
    found = (f"{name.removesuffix(weight)}{end}" for end, weight in FP8_SCALES if name.endswith(weight))
    return next((scales for scales in found if scales in names), None)


def is_scale(name: str, names: Container[str]) -> bool:
    """Return whether a tensor holds the scales of another."""
    if name.endswith(SCALES) and f"{name.removesuffix(SCALES)}{BLOCKS}" in names:
        return True
    return any(name.endswith(end) and name.removesuffix(end) + weight in names for end, weight in FP8_SCALES)
