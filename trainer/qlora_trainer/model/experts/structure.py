"""Find experts and routers in a model by their structure.

transformers 5 keeps the experts of a layer as three-dimensional parameters of one module. Most of these modules follow
the interface of ``transformers.integrations.moe.use_experts_implementation``. No model type is named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_INTERFACE = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts")
_DIMENSIONS = 3


def follows_interface(module: nn.Module) -> bool:
    """Return whether ``module`` holds the experts of a layer and follows transformers' interface for them."""
    return all(hasattr(module, name) for name in _INTERFACE)


def weight_names(group: Any) -> tuple[str, ...]:
    """Return the names of the experts' weights in a module, in the order in which they are multiplied."""
    if follows_interface(group):
        return "gate_up_proj" if group.has_gate else "up_proj", "down_proj"
    if type(group).__module__.startswith("torch."):  # the weight of a convolution is three-dimensional too
        return ()
    return tuple(name for name, parameter in group.named_parameters(recurse=False) if _is_stacked(parameter))


def expert_groups(model: nn.Module) -> dict[str, Any]:
    """Return the modules that hold the experts of a layer by full name."""
    return {name: module for name, module in model.named_modules() if weight_names(module)}


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of all experts by full name; each is three-dimensional, or packed in 4 bits."""
    return {
        f"{name}.{weight}": getattr(group, weight)
        for name, group in expert_groups(model).items()
        for weight in weight_names(group)
    }


def router_names(model: nn.Module) -> frozenset[str]:
    """Return the full names of the linear layers that choose experts.

    A router is in the module that holds the experts, beside them, and has an output for each.
    """
    return frozenset(_routers(model))


def _routers(model: nn.Module) -> Iterator[str]:
    for name, group in expert_groups(model).items():
        count = _shape(getattr(group, weight_names(group)[0]))[0]
        parent, _, own = name.rpartition(".")
        for beside, module in model.get_submodule(parent).named_modules():
            is_inside = beside == own or beside.startswith(f"{own}.")
            if not is_inside and isinstance(module, nn.Linear) and module.out_features == count:
                yield f"{parent}.{beside}" if parent else beside


def _is_stacked(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a stack of matrices."""
    shape = _shape(parameter)
    return len(shape) == _DIMENSIONS and shape[0] > 1


def _shape(parameter: Any) -> Any:
    """Return the shape of a parameter as it was before it was packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else state.shape
