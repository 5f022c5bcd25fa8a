"""A few steps of training on random rows, and what they have changed."""

from __future__ import annotations

from typing import Any

import torch

from qlora_trainer.model.base_model import trainable
from qlora_trainer.model.loss import NextTokenLoss, call_arguments, end_to_end, head_is_plain, rows_are_apart
from random_rows import random_rows

CPU = torch.device("cpu")


def module_of(model: Any) -> NextTokenLoss:
    """Return the model with its loss, as the trainer calls it."""
    module = NextTokenLoss(model, fused=head_is_plain(model))
    module.row_by_row = not rows_are_apart(module, CPU)
    return module


def steps(model: Any, count: int, rows: tuple[int, ...] = (24, 9)) -> dict[str, torch.Tensor]:
    """Train; return the gradients of the last step."""
    module = module_of(model.train())
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-2)
    for _ in range(count):
        optimizer.zero_grad()
        module(*call_arguments(end_to_end(random_rows(*rows)), CPU)).mean().backward()
        gradients = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
        optimizer.step()
    model.eval()
    return gradients


def without_gradient(model: Any) -> list[str]:
    """Train two steps; return the adapters' tensors that the second gives no gradient. In the first, A has none."""
    gradients = steps(model, 2)
    return [name for name in trainable(model) if name not in gradients or not gradients[name].any()]


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    """Return the mean total variation of next tokens' probabilities."""
    return float((p - q).abs().sum(-1).mean() / 2)
