"""Rows of random tokens."""

from __future__ import annotations

import torch


def random_rows(*lengths: int, seed: int = 0, vocabulary: int = 320) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (n,), generator=generator) for n in lengths]
