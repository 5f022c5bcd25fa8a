"""Parts of a layer with fewer passes over memory, and less held, than transformers, PEFT and bitsandbytes write them.

Each takes the place of a module's ``forward`` where it computes the same; elsewhere that module's own is called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn import functional

# ---------------------------------------------------------------------------------------------------------------- norms


def fuse_norms(model: nn.Module) -> None:
    """RMS norms in one kernel on a GPU: kept are the 16-bit input and 1/rms, not a copy of the input in fp32."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and _is_plain(module):
            module.forward = partial(_rms_norm, module, module.forward)


@torch.no_grad()
def _is_plain(norm: Any) -> bool:
    """Return whether a norm is x / rms(x) · weight, found out by trying: Gemma's weight is one less."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.is_meta or not hasattr(norm, "variance_epsilon"):
        return False
    x = torch.linspace(-2, 2, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
    fused = functional.rms_norm(x, weight.shape, weight, norm.variance_epsilon)
    return torch.allclose(norm(x).float(), fused.float(), rtol=2e-2, atol=1e-3)


def _rms_norm(norm: Any, written_out: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda or x.dtype is not norm.weight.dtype:
        return written_out(x)  # on a CPU torch composes it of the same parts
    return functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


# -------------------------------------------------------------------------------------------------------------- adapter


def fuse_adapters(model: nn.Module) -> None:
    """Add B(A(x))·scale to the base's output in the matrix product itself.

    PEFT copies the output, computes the update, scales it and adds it: four tensors of the output's size, all of them
    written and read. DoRA and its like stay PEFT's; adapters on parameters, such as experts, have a way of their own.
    """
    for module in model.modules():
        is_layer = isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
        if is_layer and hasattr(module, "base_layer") and not module.lora_variant:
            module.forward = partial(_lora, module, module.forward)


def _lora(layer: Any, peft: Callable[..., torch.Tensor], x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if more or named or layer.disable_adapters or layer.merged or len(active) != 1:
        return peft(x, *more, **named)
    (name,) = active
    down, up = layer.lora_A[name], layer.lora_B[name]
    if not hasattr(up, "parametrizations") or up.bias is not None or x.ndim not in (2, 3):
        return peft(x)  # in fp32 ZeRO-3 gathers the weight only for whoever calls the layer
    weight = up.weight
    low = down(layer.lora_dropout[name](x.to(weight.dtype)))  # first: the backward pass then ends with it
    out = layer.base_layer(x)
    if out.dtype is not weight.dtype:
        return peft(x)
    # In place only where autograd allows it: what a function made as a view stays as it is.
    in_place = not out._is_view()  # noqa: SLF001 there is no public way to ask
    add: Callable[..., torch.Tensor]
    if out.ndim == 3:
        add = out.baddbmm_ if in_place else out.baddbmm
        return add(low, weight.t().expand(len(low), -1, -1), alpha=layer.scaling[name])
    add = out.addmm_ if in_place else out.addmm
    return add(low, weight.t(), alpha=layer.scaling[name])


# ------------------------------------------------------------------------------------------------------------- 8 bit


def forget_inputs(model: nn.Module) -> None:
    """Have 8-bit layers let go of their inputs, which only a weight that learns would need.

    bitsandbytes' ``MatMul8bitLt`` holds them as attributes, out of reach of gradient checkpointing: 10 GB for 4,096
    tokens of an 8B model.
    """
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_hook(_forget)


def _forget(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
    node: Any = output.grad_fn
    if hasattr(node, "tensor_states"):
        node.tensors = (None, None, None)
        node.tensor_states = (None, None)
    elif hasattr(node, "grad_shape") and hasattr(node, "A"):  # on a CPU
        node.A = None
