"""Loss of the held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_trainer.data.batches import MicroBatch
from qlora_trainer.model.loss import call_arguments
from qlora_trainer.ranks import Ranks


@dataclass(frozen=True)
class Stopped:
    """A rank was told to stop before the last batch: there is no result."""


@torch.no_grad()
def evaluate(
    engine: Any, batches: Iterable[MicroBatch], ranks: Ranks, stop_asked: Callable[[], bool] = lambda: False
) -> float | Stopped:
    """Return the mean loss in nats over the target tokens of all ranks' batches. A collective.

    Args:
        engine: with the model.
        batches: of this rank, as many as every rank has.
        ranks: all of them.
        stop_asked: whether this rank was told to stop; asked before each batch.

    Returns:
        Stopped if a rank was told to stop: all ranks stop before the same batch.

    """
    engine.eval()
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    tokens = 0
    for batch in batches:
        if ranks.sum(stop_asked())[0]:
            engine.train()
            return Stopped()
        losses = engine(*call_arguments(batch, ranks.device))
        total += losses.double().sum()
        tokens += len(losses)
    engine.train()
    loss_sum, count = ranks.sum(total.item(), tokens)
    return loss_sum / count


def perplexity(loss: float) -> float:
    """Return exp(loss); infinity where that is more than a float holds, above 709 nats."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
