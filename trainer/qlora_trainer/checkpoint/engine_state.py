"""Take adapter and optimizer state from an engine for a checkpoint, and put them back exactly.

Under ZeRO every rank writes its partition of the fp32 weights and of the optimizer state. The full adapter is written
once besides. The frozen base is in no checkpoint; DeepSpeed's own would hold it, and fails on NF4 under ZeRO-3. Random
numbers follow from seed, step and rank (:mod:`qlora_trainer.engine.seeding`), so that no state of theirs is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qlora_trainer.checkpoint.checkpoint_store import pack_tensors, unpack_tensors
from qlora_trainer.engine.deepspeed_engine import base_optimizer, optimizer_parameters
from qlora_trainer.engine.deepspeed_import import deepspeed
from qlora_trainer.model.base_model import trainable

ADAPTER_FILE = "adapter.safetensors"


def optimizer_file(shard: int) -> str:
    """Shard of the optimizer: the rank's own under ZeRO, 0 without (there all ranks hold the same)."""
    return f"optimizer-{shard:05d}.safetensors"


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's fp32 weights by PEFT's names, on the CPU. A collective under ZeRO-3: all ranks call it."""
    parameters = trainable(model)
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=_is_partitioned(parameters)):
        return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in parameters.items()}


def load_adapter_tensors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put an adapter's weights into the model. A collective under ZeRO-3: all ranks call it.

    Raises:
        KeyError: the adapter has other layers than the model.

    """
    parameters = trainable(model)
    with (
        torch.no_grad(),
        deepspeed.zero.GatheredParameters(
            list(parameters.values()), modifier_rank=0, enabled=_is_partitioned(parameters)
        ),
    ):
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def optimizer_tensors(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's share of the optimizer: its state bit for bit, and under ZeRO its partition of the fp32 weights."""
    optimizer = base_optimizer(engine)
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    adapter = {id(p) for p in engine.module.parameters()}
    for place, parameter in optimizer_parameters(engine):
        if id(parameter) not in adapter:  # a ZeRO partition; without ZeRO it is in the adapter's file
            tensors[f"{place}.weight"] = parameter.detach().to("cpu", copy=True).contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{place}.{key}"] = value.detach().to("cpu", copy=True)
            else:
                numbers[f"{place}.{key}"] = value
    tensors["numbers"] = torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)
    return tensors


def make_optimizer_state(engine: Any) -> None:
    """Have the optimizer make its state now, as far as it can before the first update."""
    optimizer = base_optimizer(engine)
    for place, parameter in optimizer_parameters(engine):
        _state_of(optimizer, place, parameter)


@torch.no_grad()
def load_optimizer_tensors(engine: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` took from an engine of the same shape; nothing else stays."""
    optimizer = base_optimizer(engine)
    numbers = json.loads(bytes(tensors["numbers"].tolist()))
    for place, parameter in optimizer_parameters(engine):
        if f"{place}.weight" in tensors:
            parameter.copy_(tensors[f"{place}.weight"])
        state = _state_of(optimizer, place, parameter)
        own = {name.removeprefix(f"{place}."): t for name, t in tensors.items() if name.startswith(f"{place}.")}
        own.pop("weight", None)
        own_numbers = {n.removeprefix(f"{place}."): v for n, v in numbers.items() if n.startswith(f"{place}.")}
        for key in state.keys() - own.keys() - own_numbers.keys():
            del state[key]
        for key, saved in own.items():
            _put(state, key, saved, parameter)
        state.update(own_numbers)


@contextmanager
def unchanged(engine: Any) -> Iterator[None]:
    """Weights and optimizer state are afterwards what they were before, by way of a checkpoint's bytes. A collective.

    Not so after an exception.
    """
    make_optimizer_state(engine)
    model = engine.module.model
    adapter, optimizer = pack_tensors(adapter_tensors(model)), pack_tensors(optimizer_tensors(engine))
    yield
    load_adapter_tensors(model, unpack_tensors(adapter))
    load_optimizer_tensors(engine, unpack_tensors(optimizer))


def partition_sizes(engine: Any) -> dict[str, int]:
    """Elements of this rank's partition of each parameter group, by the names of :func:`optimizer_tensors`."""
    return {place: parameter.numel() for place, parameter in optimizer_parameters(engine)}


def _state_of(optimizer: Any, place: str, parameter: torch.Tensor) -> Any:
    """Return the optimizer's state of one parameter, made as the optimizer itself makes it (paged buffers included)."""
    if hasattr(optimizer, "init_state") and not optimizer.state.get(parameter):  # bitsandbytes
        if not optimizer.initialized:
            optimizer.check_overrides()
            optimizer.initialized = True
        index = int(place.split(".", maxsplit=1)[0])
        group = optimizer.param_groups[index]
        others, group["params"] = group["params"], [parameter]  # under ZeRO-3 groups are empty between steps
        optimizer.init_state(group, parameter, index, 0)
        group["params"] = others
    return optimizer.state[parameter]


def _put(state: Any, key: str, saved: torch.Tensor, parameter: torch.Tensor) -> None:
    place = state.get(key)
    if isinstance(place, torch.Tensor) and place.shape == saved.shape and place.dtype == saved.dtype:
        place.copy_(saved)
    else:
        state[key] = saved.to(parameter.device)


def _is_partitioned(parameters: dict[str, nn.Parameter]) -> bool:
    return any(hasattr(p, "ds_id") for p in parameters.values())
