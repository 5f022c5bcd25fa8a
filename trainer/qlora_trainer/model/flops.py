"""Arithmetic of one token, so that speed can be compared with the card's peak."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qlora_trainer.model.composite import text_config
from qlora_trainer.model.trained_tokens import plain_head

FROZEN, LEARNS = 4, 6
"""FLOP for each weight and token: 2 forward, 2 for the gradient of the input, 2 for that of a weight that learns."""
ATTENTION_PASSES = 3.5
"""Forward once, backward 2.5 times that. Dao 2023 (FlashAttention-2), section 4.1."""


def flops_per_token(model: Any, lengths: NDArray[np.int64], target_share: float) -> float | None:
    """Return FLOP of one token, both passes, without recomputation; None where it cannot be told (mixtures of experts).

    Args:
        model: with its adapter.
        lengths: tokens of each row; a token attends to those of its own row alone.
        target_share: of the tokens, those that count: the head is computed for no others.

    """
    config = text_config(model.config)
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return None
    if not all(isinstance(getattr(config, name, None), int) for name in ("hidden_size", "num_hidden_layers")):
        return None
    head = plain_head(model)
    weights = sum(
        (LEARNS if module.weight.requires_grad else FROZEN)
        * module.in_features
        * module.out_features
        * (target_share if module is head else 1.0)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
    # Of a row of n tokens each sees (n + 1) / 2 in the mean; scores and their sum are 2 FLOP each for every feature.
    attended = float((lengths * (lengths + 1) / 2).sum() / max(1, lengths.sum()))
    return float(weights + ATTENTION_PASSES * 4 * attended * config.hidden_size * config.num_hidden_layers)
