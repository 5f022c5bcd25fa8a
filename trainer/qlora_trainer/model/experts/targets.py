"""Select the layers and experts that get an adapter, and configure PEFT for them."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_trainer.errors import UserError
from qlora_trainer.model.composite import output_head_names, tower_layers
from qlora_trainer.model.experts.adapter import ExpertAdapter
from qlora_trainer.model.experts.structure import expert_groups, expert_parameters, router_names
from qlora_trainer.model.layer_use import known_layer_use
from qlora_trainer.model.trained_tokens import plain_head

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qlora_api.spec import LoRASpec

FIELD = "spec.lora.targetModules"
_LINEAR = (nn.Linear, Linear4bit, Linear8bitLt, Conv1D)


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Return all linear layers but the output head and routers, by full name.

    A subclass of a linear layer with a forward pass of its own, such as a router that returns a tuple, is none.
    """
    head = plain_head(model) if hasattr(model, "get_output_embeddings") else None
    routers = router_names(model)
    return {n: m for n, m in model.named_modules() if type(m) in _LINEAR and m is not head and n not in routers}


@dataclass(frozen=True)
class Targets:
    """Targets as PEFT's configuration names them."""

    modules: tuple[str, ...]
    """``target_modules``: linear layers."""
    parameters: tuple[str, ...] = ()
    """``target_parameters``: experts, and linear layers whose names PEFT would take for those of experts."""
    excluded: tuple[str, ...] = ()
    """``exclude_modules``: routers, and layers that would learn nothing, that are named as others are."""


def check_targets(model: Any, lora: LoRASpec, model_name: str) -> None:
    """Find out whether every target names a linear layer or experts; works on a model without weights too.

    Raises:
        UserError: a target matches none, or a router; the message lists those that exist.

    """
    names = [*linear_layers(model), *expert_parameters(model)]
    if not names:
        raise UserError("spec.model.source", model_name, "has no linear layers that could be quantized and adapted")
    names += output_head_names(model)
    routers = router_names(model)
    for target in lora.target_modules or ():
        if any(is_target(n, target) for n in names):
            continue
        if any(is_target(n, target) for n in routers):
            raise UserError(FIELD, target, f"is a router of {model_name}: routers are not adapted")
        if any(is_target(n, target) for n in tower_layers(model)):
            raise UserError(
                FIELD, target, f"is in a tower of {model_name} for images or sound: its text alone is trained"
            )
        kinds = ", ".join(sorted({kind_of(n) for n in names}))
        raise UserError(FIELD, target, f"matches no linear layer of {model_name}; its linear layers are {kinds}")
    if lora.dora and _named(expert_parameters(model), lora.target_modules):
        raise UserError(
            "spec.lora.dora",
            lora.dora,
            f"is not available for experts, which {model_name} has: set false, or name linear layers in {FIELD}",
        )


def choose_targets(model: Any, lora: LoRASpec) -> Targets:
    """Return what the job names, or else all linear layers and experts that an adapter can be on."""
    named = lora.target_modules
    layers = linear_layers(model)
    left = [] if named else layers_without_adapter(model)
    modules = list(named or sorted({kind_of(n) for n in layers.keys() - left}))
    parameters = sorted({".".join(n.rsplit(".", 2)[1:]) for n in _named(expert_parameters(model), named)})
    excluded = _endings([n for n in left if _named([n], modules)], layers.keys() - left)
    modules = [m for m in modules if _named([*layers, *output_head_names(model)], [m])]
    taken = [m for m in modules if _is_taken_for_experts(model, m)]
    modules = [m for m in modules if m not in taken]
    parameters += [f"{m}.weight" for m in taken]
    routers = _named(router_names(model), modules)
    return Targets(tuple(modules), tuple(parameters), tuple(sorted({*routers, *excluded})))


def layers_without_adapter(model: Any) -> list[str]:
    """Return the linear layers that get no adapter by default: none would learn there, or PEFT allows none."""
    idle = known_layer_use(model).without_adapter
    return sorted(n for n in linear_layers(model) if n in idle or _is_refused(model, n.rpartition(".")[2]))


def kind_of(name: str) -> str:
    """Return the end of a layer's name that tells its kind: its own name, and what it is a number of."""
    parts = name.split(".")
    first = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[first:])


def _endings(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Return the shortest ends of names that name no other layer."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        found.add(next((end for end in ends if not _named(others, [end])), name))
    return tuple(sorted(found))


def _is_refused(model: Any, name: str) -> bool:
    """Return whether PEFT refuses an adapter on a layer: on Mamba's output, whose weight fused kernels read."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name)
    except ValueError:
        return True
    return False


def lora_config(model: Any, lora: LoRASpec, **options: Any) -> LoraConfig:
    """Return PEFT's configuration for the targets of a job; ``options`` are its other fields."""
    targets = choose_targets(model, lora)
    config = LoraConfig(target_modules=list(targets.modules), **options)
    if targets.parameters:
        config.target_parameters = list(targets.parameters)
        groups = {type(group) for group in expert_groups(model).values()}
        config._register_custom_module(  # noqa: SLF001 PEFT's documented way to bring own layers
            {**dict.fromkeys(groups, ExpertAdapter), **dict.fromkeys(_LINEAR, _linear_adapter)}
        )
    if targets.excluded:
        config.exclude_modules = list(targets.excluded)
    return config


def name_text_alone(config: LoraConfig, model: Any) -> None:
    """Change a configuration so that PEFT finds the same layers in a model with its towers.

    Args:
        config: of the adapter, which names layers by their ends.
        model: that was trained, without towers.

    """
    towers = tower_layers(model)
    if any(_named(towers, [target]) for target in config.target_modules or ()):
        outermost = [name for name in towers if not any(name.startswith(f"{other}.") for other in towers)]
        excluded = [rf"{re.escape(name)}(\..*)?" for name in outermost]
        excluded += [rf"(.*\.)?{re.escape(name)}" for name in sorted(config.exclude_modules or ())]
        config.exclude_modules = "|".join(excluded)
    if config.target_parameters:
        owners = {target: target.rpartition(".")[0] for target in config.target_parameters}
        parameters = [name.replace(".base_layer", "") for name, _ in model.named_parameters()]
        config.target_parameters = [
            name
            for target, owner in owners.items()
            for name in (_named(parameters, [target]) if _named(towers, [owner]) else [target])
        ]


def _linear_adapter(target: Any, adapter_name: str, config: LoraConfig, **more: Any) -> nn.Module | None:
    """Return PEFT's adapter on a linear layer that is targeted by its weight's name; None for any other."""
    if more.get("parameter_name") is None:
        return None
    plain = copy.copy(config)
    plain._custom_modules = None  # noqa: SLF001
    made: nn.Module = LoraModel._create_new_module(  # noqa: SLF001
        plain, adapter_name, target, **{**more, "parameter_name": None}
    )
    return made


def _is_taken_for_experts(model: Any, module: str) -> bool:
    """Return whether PEFT takes a linear layer's name for that of experts, as checkpoints of transformers 4 had it."""
    config = LoraConfig(target_modules=[module])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # a part of what is one parameter now
        return True
    return module not in (config.target_modules or ())


def _named(names: Iterable[str], targets: Iterable[str] | None) -> list[str]:
    """Return the names that a target names; all without targets."""
    return [n for n in names if targets is None or any(is_target(n, t) for t in targets)]


def is_target(name: str, target: str) -> bool:
    """Return whether a target is a full name or its dotted end."""
    return name == target or name.endswith(f".{target}")
