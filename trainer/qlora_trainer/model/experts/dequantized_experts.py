"""Packed experts of modules that do not follow transformers' interface, such as Llama 4's.

Their own forward pass is called with weights that are dequantized for its time. What autograd saves of them is made
again in the backward pass instead of being kept.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from qlora_trainer.model.experts.adapter import adapter_of
from qlora_trainer.model.experts.packed import FrozenExperts
from qlora_trainer.model.experts.structure import expert_groups, follows_interface, weight_names

if TYPE_CHECKING:
    from collections.abc import Callable


def dequantize_for_forward(model: Any) -> None:
    """Have modules that do not follow the interface see their experts' weights in 16 bits."""
    for group in expert_groups(model).values():
        if not follows_interface(group):
            group.forward = partial(_forward, group, group.forward)


def _forward(group: Any, own: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    weights = {name: _weight(group, name) for name in weight_names(group)}
    places = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items() if not weight.is_meta}

    def pack(tensor: torch.Tensor) -> Any:
        name = places.get(tensor.untyped_storage().data_ptr())
        if name is None:
            return tensor
        return name, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        name, shape, stride, offset = kept
        with torch.no_grad():
            return _weight(group, name).as_strided(shape, stride, offset)

    vars(group).update(weights)  # found before the parameters of the same names
    try:
        with saved_tensors_hooks(pack, unpack):
            return own(*arguments, **named)
    finally:
        for name in weights:
            del vars(group)[name]


def _weight(group: Any, name: str) -> torch.Tensor:
    """Return the weight of all experts, with the update of its adapter."""
    parameters = dict(group.named_parameters(recurse=False))  # getattr would find what is dequantized
    experts = FrozenExperts(parameters[name])
    weight = experts.of(list(range(experts.shape[0]))).contiguous()
    adapter = adapter_of(group, name)
    return weight if adapter is None else adapter.added_to_weight(weight)
