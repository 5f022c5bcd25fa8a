"""Bases of random weights, made and quantized on the device layer by layer: no hub, no disk, one layer in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.spec import QuantizationSpec, QuantizationType
from qlora_trainer.model.base_model import ready_base
from qlora_trainer.model.device.attention import choose_attention, register
from qlora_trainer.model.device.compute_type import DTYPES, resolved_on
from qlora_trainer.model.experts.targets import linear_layers

SEED = 42
OUTLIERS = 6.0
"""transformers' ``llm_int8_threshold``."""


def random_base(
    values: dict[str, Any], quantization: QuantizationSpec, device: torch.device, attention: str | None = None
) -> Any:
    """A frozen base as ``qlora_trainer.model.base_model.load_base`` leaves it.

    Args:
        values: of its ``config.json``, ``model_type`` among them.
        quantization: how the linear layers are held.
        device: where it is.
        attention: transformers' name of an implementation; None: the trainer's own choice.

    """
    register()
    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    kind = AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001 as the trainer does
    quantization = resolved_on(quantization, device)
    dtype = DTYPES[quantization.compute_type]
    attention = attention or choose_attention(kind, config)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    generator = torch.Generator(device).manual_seed(SEED)
    deviation = 0.005 if quantization.type is QuantizationType.INT8 else 0.02  # a trained base has few outliers

    def weights(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:  # of norms
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=deviation, generator=generator)

    if quantization.type is not QuantizationType.NONE:
        for name, linear in linear_layers(model).items():
            _place(model, name, _quantized(linear, weights(linear.weight.shape), quantization))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            _place(model, name, nn.Parameter(weights(parameter.shape), requires_grad=False))
    model.tie_weights()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), persistent=False)
    # PEFT looks here for the kind of LoRA layer.
    model.is_loaded_in_4bit = quantization.type.is_four_bit
    model.is_loaded_in_8bit = quantization.type is QuantizationType.INT8
    return ready_base(model, quantization)


def _quantized(linear: Any, weight: torch.Tensor, quantization: QuantizationSpec) -> nn.Module:
    """The layer with its weight packed; biases stay on the meta device."""
    inputs, outputs, bias = linear.in_features, linear.out_features, linear.bias is not None
    layer: Any
    if quantization.type is QuantizationType.INT8:
        with torch.device("meta"):
            layer = Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False, threshold=OUTLIERS)
        layer.weight = Int8Params(weight, requires_grad=False)._quantize(weight.device)  # noqa: SLF001 .to() asks for a CPU tensor
    else:
        with torch.device("meta"):
            layer = Linear4bit(inputs, outputs, bias, compute_dtype=weight.dtype)
        packed = Params4bit(
            weight,
            requires_grad=False,
            quant_type=quantization.type.value.lower(),
            compress_statistics=quantization.double_quantization,
        )
        layer.weight = packed.to(weight.device)
    if bias:
        layer.bias = nn.Parameter(torch.empty(outputs, dtype=weight.dtype, device="meta"), requires_grad=False)
    return layer


def _place(model: Any, name: str, value: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, value)
