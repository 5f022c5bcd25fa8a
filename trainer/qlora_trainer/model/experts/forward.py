"""The forward pass of a group of experts: an implementation of transformers' experts interface."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlora_trainer.model.experts.adapter import adapter_of
from qlora_trainer.model.experts.dequantized_experts import dequantize_for_forward
from qlora_trainer.model.experts.products import ExpertAssignment, frozen_product
from qlora_trainer.model.experts.structure import expert_groups, follows_interface, weight_names

NAME = "qlora"
"""Name under which transformers finds :func:`experts_forward`."""


def use_own_forward(model: Any) -> None:
    """Have the experts of a model computed by :func:`experts_forward`, as far as they follow the interface."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    for group in expert_groups(model).values():
        if follows_interface(group):
            group.config._experts_implementation = NAME  # noqa: SLF001 set_experts_implementation asks the class first
    dequantize_for_forward(model)


def experts_forward(
    group: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute what ``transformers.integrations.moe.grouped_mm_experts_forward`` computes.

    Args:
        group: the module with the experts.
        hidden_states: [T, hidden].
        top_k_index: [T, k] experts of each token.
        top_k_weights: [T, k] their weights.

    Returns:
        [T, hidden].

    """
    per_token = top_k_index.shape[-1]
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    visits = ExpertAssignment.of(experts, group.num_experts)
    first, second = weight_names(group)
    out = _linear(group, first, hidden_states[order // per_token], experts, visits)
    out = group._apply_gate(out) if group.has_gate else group.act_fn(out)  # noqa: SLF001 the interface's own name
    out = _linear(group, second, out, experts, visits)
    if group.has_post_expert_norm:
        out = group.post_expert_norm(out)
    weighted = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    summed = weighted[place].view(len(hidden_states), per_token, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)


def _linear(group: Any, name: str, x: torch.Tensor, experts: torch.Tensor, visits: ExpertAssignment) -> torch.Tensor:
    """Multiply with one of the weights; add its bias and its adapter's update."""
    out = frozen_product(x, getattr(group, name), visits, transposed=group.is_transposed)
    if group.has_bias:
        out = out + getattr(group, f"{name}_bias")[experts]
    adapter = adapter_of(group, name)
    return out if adapter is None else adapter.added(out, x, visits)
