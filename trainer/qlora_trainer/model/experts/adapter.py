"""Adapters on experts: trained by a module of the trainer's own, published as PEFT's ``target_parameters``.

PEFT's ``ParamWrapper`` adds B·A to the whole weight in each forward pass, which a packed weight does not allow, and
which takes as much memory as all experts in 16 bits. :class:`ExpertAdapter` has its tensors and names, and adds the
update to the output instead.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from qlora_trainer.model.experts.packed import FrozenExperts
from qlora_trainer.model.experts.products import ExpertAssignment, low_rank_product

_ADAPTERS = "_qlora_adapters"


class ExpertAdapter(ParamWrapper):  # type: ignore[misc]
    """The adapter on one weight of a group of experts.

    Args:
        base_layer: the group, or the adapter on another of its weights.
        adapter_name: PEFT's.
        parameter_name: of the weight.
        config: PEFT's.
        more: what PEFT passes besides.

    """

    def __init__(
        self, base_layer: Any, adapter_name: str, parameter_name: str, config: LoraConfig, **more: Any
    ) -> None:
        plain = copy.copy(config)
        plain.lora_dropout = 0.0  # ParamWrapper refuses it, as it does not see the input
        super().__init__(base_layer, adapter_name, parameter_name, plain, **more)
        if config.lora_dropout:
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        vars(self.get_base_layer()).setdefault(_ADAPTERS, {})[parameter_name] = self

    def get_param(self) -> torch.Tensor:
        """Return a tensor of the weight's shape and type, without its contents."""
        weight = FrozenExperts(dict(self.get_base_layer().named_parameters(recurse=False))[self.parameter_name])
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or getattr(self.get_base_layer(), self.parameter_name).device
        if device.type != "meta":
            for part in (self.lora_A, self.lora_B):
                part[adapter_name] = part[adapter_name].to(device, dtype=self.get_param().dtype)

    def forward(self, x: torch.Tensor, *more: Any, **named: Any) -> Any:
        """Call the group, which finds its adapters by :func:`adapter_of`."""
        return self.base_layer(x, *more, **named)

    def added(self, out: torch.Tensor, x: torch.Tensor, visits: ExpertAssignment) -> torch.Tensor:
        """Add the update to the output of the frozen weight.

        Args:
            out: [S, outputs]; changed in place.
            x: [S, inputs], tokens in the order of their experts.
            visits: by the tokens.

        """
        for name in self.active_adapters:
            if self.disable_adapters or name not in self.lora_A:
                continue
            a, b = self._factors(name)
            update = low_rank_product(self.lora_dropout[name](x.to(a.dtype)), a, b, visits)
            out = out.add_(update, alpha=self.scaling[name])
        return out

    def added_to_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight of all experts with the update, as PEFT's own forward pass has it.

        Args:
            weight: [experts, rows, columns].

        """
        for name in self.active_adapters:
            if not self.disable_adapters and name in self.lora_A:
                left, right, scale = self.get_delta_factors(name)
                weight = torch.baddbmm(weight, left, right, alpha=scale)
        return weight

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [experts, rank, inputs] and [experts, outputs, rank] of an adapter.

        PEFT numbers A's rows by expert and then rank, and B's columns by rank and then expert. Where the weight is
        [experts, inputs, outputs] its A reads the inputs all the same.
        """
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        a = a.reshape(self.num_experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1).contiguous()
        return a, b


ExpertAdapter.__name__ = ParamWrapper.__name__  # by which PEFT tells that a parameter was wrapped


def adapter_of(group: nn.Module, parameter: str) -> ExpertAdapter | None:
    """Return the adapter on one weight of a group of experts; None where it has none."""
    adapters: dict[str, ExpertAdapter] = vars(group).get(_ADAPTERS, {})
    return adapters.get(parameter)
