"""Optimizers, parameter groups and the learning-rate schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch

from qlora_api.spec import Offload, Optimizer, Schedule, TrainingSpec
from qlora_trainer.model.trained_tokens import TRAINED_ROWS

log = logging.getLogger(__name__)

_BITSANDBYTES = {
    Optimizer.PAGED_ADAMW_8BIT: bnb.optim.PagedAdamW8bit,
    Optimizer.PAGED_ADAMW_32BIT: bnb.optim.PagedAdamW32bit,
    Optimizer.ADAMW_8BIT: bnb.optim.AdamW8bit,
}


def parameter_groups(parameters: Mapping[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and magnitudes (one dimension) and embeddings do not. Empty groups are left out."""
    decays = {name: p.ndim >= 2 and TRAINED_ROWS not in name for name, p in parameters.items()}
    matrices = [p for name, p in parameters.items() if decays[name]]
    others = [p for name, p in parameters.items() if not decays[name]]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], training: TrainingSpec, offload: Offload
) -> torch.optim.Optimizer:
    """AdamW in the form the job asks for, with the betas of QLoRA's appendix B.2 left at PyTorch's (0.9, 0.999).

    With offload the state lives on the host, where torch's fused CPU AdamW takes the place of the paged optimizers.
    """
    groups = parameter_groups(parameters, float(training.weight_decay))
    paged = training.optimizer in (Optimizer.PAGED_ADAMW_8BIT, Optimizer.PAGED_ADAMW_32BIT)
    if offload is Offload.OPTIMIZER and training.optimizer is not Optimizer.ADAMW:
        log.info("%s is replaced by AdamW on the host", training.optimizer)
    elif paged and not torch.cuda.is_available():
        log.info("%s is replaced by its plain form, as there is no CUDA device", training.optimizer)
    learning_rate = float(training.learning_rate)
    if training.optimizer is Optimizer.ADAMW or offload is Offload.OPTIMIZER:
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    optimizer: torch.optim.Optimizer = _BITSANDBYTES[training.optimizer](groups, lr=learning_rate)
    return optimizer


def learning_rate(training: TrainingSpec, step: int, total_steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of ``total_steps``: a function, so that resuming is exact."""
    peak = float(training.learning_rate)
    if step < training.warmup_steps:
        return peak * (step + 1) / (training.warmup_steps + 1)
    done = (step - training.warmup_steps) / max(1, total_steps - training.warmup_steps)
    match training.schedule:
        case Schedule.CONSTANT:
            return peak
        case Schedule.LINEAR:
            return peak * (1 - done)
        case Schedule.COSINE:
            return peak * 0.5 * (1 + math.cos(math.pi * done))
