"""Loss of a whole model on a few rows: compares a merged model with its adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from qlora_trainer.data.tokenized_rows import TokenizedRows

MOST_ROWS = 4
MOST_TOKENS = 256
"""Maximum number of tokens of a row. Merged models are evaluated on the CPU: an 8B model takes about a minute for all
rows."""


@torch.no_grad()
def sample_loss(model: Any, rows: TokenizedRows, beat: Callable[[], None] = lambda: None) -> float:
    """Return the mean loss in nats over every next token of some rows, which lie evenly among all.

    Args:
        model: a causal language model, called as transformers has it.
        rows: the evaluation rows, or the training rows where there are none.
        beat: called after each row, as a sign of life.

    """
    model.eval()
    total, tokens = 0.0, 0
    for number in np.unique(np.linspace(0, len(rows) - 1, MOST_ROWS).astype(int)):
        row = torch.from_numpy(rows.row(number)[0][:MOST_TOKENS].astype(np.int64))[None].to(model.device)
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        total += functional.cross_entropy(logits, row[0, 1:], reduction="sum").double().item()
        tokens += row.shape[1] - 1
        beat()
    return total / max(1, tokens)
