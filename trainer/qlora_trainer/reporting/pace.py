"""Measure how long each rank takes for a step by itself: the straggler is shown, with its section, and never ended."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from qlora_api.contract import RankActivity
from qlora_trainer.liveness.heartbeat import Section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_trainer.ranks import Ranks

OWN = (Section.DATA, Section.FORWARD, Section.BACKWARD, Section.OPTIMIZER)
"""Sections of a step in which a rank works on its own. On a GPU the time of its kernels is not included, since the host
only launches them."""


class Pace:
    """Pace of one rank, and of all by what they tell each other once a step."""

    def __init__(self, ranks: Ranks, nodes: Sequence[str]) -> None:
        self._ranks = ranks
        self._nodes = nodes
        """By rank."""
        self._before = ranks.heartbeat.section_seconds()

    def of_this_rank(self) -> list[float]:
        """Seconds of this rank by section since it was asked last, zeros for all others: to be summed over ranks."""
        spent = self._ranks.heartbeat.section_seconds()
        own = [spent[s] - self._before[s] for s in OWN]
        self._before = spent
        table = [0.0] * (len(OWN) * self._ranks.world_size)
        start = len(OWN) * self._ranks.rank
        table[start : start + len(OWN)] = own
        return table

    def slowest(self, table: Sequence[float]) -> RankActivity | None:
        """Read the sum of all ranks' tables; None where there is no other rank to compare with."""
        if self._ranks.world_size == 1:
            return None
        rows = [table[i : i + len(OWN)] for i in range(0, len(table), len(OWN))]
        totals = [sum(row) for row in rows]
        rank = max(range(len(rows)), key=totals.__getitem__)
        typical = [median(column) for column in zip(*rows, strict=True)]
        beyond = [own - usual for own, usual in zip(rows[rank], typical, strict=True)]
        return RankActivity(
            rank=rank,
            node=self._nodes[rank],
            section=OWN[beyond.index(max(beyond))].title,
            seconds=round(totals[rank], 3),
            median_seconds=round(median(totals), 3),
        )
