"""Rows of random tokens, flattened as the trainer flattens them."""

from __future__ import annotations

import torch

from qlora_trainer.data.batches import MicroBatch


def flatten(rows: list[torch.Tensor]) -> MicroBatch:
    """Every token of every row is a target, but the first."""
    labels = [torch.cat([r[1:], torch.tensor([-100])]) for r in rows]
    lengths = torch.tensor([0] + [len(r) for r in rows])
    return MicroBatch(
        input_ids=torch.cat(rows)[None],
        labels=torch.cat(labels)[None],
        position_ids=torch.cat([torch.arange(len(r)) for r in rows])[None],
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
        max_seqlen=max(len(r) for r in rows),
    )


def random_rows(*lengths: int, seed: int = 0, vocabulary: int = 320) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (n,), generator=generator) for n in lengths]
