"""Measure what an engine holds besides the weights of its model."""

from __future__ import annotations

from typing import Any

import torch

from qlora_trainer.engine.deepspeed_engine import base_optimizer, optimizer_parameters


def optimizer_bytes(engine: Any) -> int:
    """Return bytes of this rank's optimizer state, and of its ZeRO partition of the fp32 weights where it is a copy."""
    optimizer = base_optimizer(engine)
    own = {p.data_ptr() for p in engine.module.parameters()}
    size = 0
    for _, parameter in optimizer_parameters(engine):
        if optimizer is not engine.optimizer and parameter.data_ptr() not in own:
            size += parameter.numel() * parameter.element_size()
        size += sum(
            v.numel() * v.element_size()
            for v in optimizer.state.get(parameter, {}).values()
            if isinstance(v, torch.Tensor)
        )
    return size


def gradient_bytes(engine: Any) -> int:
    """Return the bytes of the gradients this rank holds between backward and step, whole or its ZeRO partition."""
    tensors = [p.grad for p in engine.module.parameters() if p.grad is not None]
    for group in (getattr(engine.optimizer, "averaged_gradients", None) or {}).values():
        tensors += [t for t in group or () if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
