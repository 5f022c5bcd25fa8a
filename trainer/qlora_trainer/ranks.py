"""This process among the ranks of an attempt, and small collectives over all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from qlora_trainer.liveness.heartbeat import Heartbeat, Section

GATHER_BYTES = 2**20
"""Maximum size of the value that each rank contributes to :meth:`Ranks.gather`."""


@dataclass(frozen=True)
class Ranks:
    """Rank of this process, and the number of ranks."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """Heartbeat on which this process reports its current section."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Element-wise sum over all ranks, the same on each. A collective."""
        with self.heartbeat.during(Section.COLLECTIVE):
            tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
            dist.all_reduce(tensor)
            return tensor.tolist()

    def max(self, *values: float) -> list[float]:
        """Element-wise maximum over all ranks, the same on each. A collective."""
        with self.heartbeat.during(Section.COLLECTIVE):
            tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return the ``value`` of every rank, in rank order, on each: anything small that JSON can hold. A collective.

        PyTorch's all_gather_object would unpickle, and so run, whatever comes over the network.

        Raises:
            ValueError: the value is larger than ``GATHER_BYTES``, or a rank sends what is no JSON.

        """
        own = json.dumps(value).encode()
        if len(own) > GATHER_BYTES:
            raise ValueError(f"{len(own)} bytes are too many to gather; at most {GATHER_BYTES}")
        with self.heartbeat.during(Section.COLLECTIVE):
            sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
            sizes[self.rank] = len(own)
            dist.all_reduce(sizes)
            lengths = [min(max(size, 0), GATHER_BYTES) for size in sizes.tolist()]
            padded = torch.zeros(max(lengths), dtype=torch.uint8)
            padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
            parts = [torch.zeros_like(padded, device=self.device) for _ in range(self.world_size)]
            dist.all_gather(parts, padded.to(self.device))
        rows = zip(parts, lengths, strict=True)
        return [json.loads(part[:length].cpu().numpy().tobytes()) for part, length in rows]
