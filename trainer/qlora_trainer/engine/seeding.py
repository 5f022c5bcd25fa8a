"""Seed the random numbers of each step."""

from __future__ import annotations

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set the random numbers of one rank in one step, dropout's: the same whatever was computed or stopped before.

    Defined for any number of ranks, unlike a saved state. The other ranks', and the next step's, are independent of it.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))
