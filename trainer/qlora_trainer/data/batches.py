"""The order of the data, and what each rank computes in each step. No communication, no state, no padding.

Everything follows from (rows, sequences, global batch size, seed): any rank on any number of GPUs can say what step n
holds, so that a resumed run needs its step number and nothing else, and the number of target tokens over all ranks is
known to each of them without asking.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from qlora_trainer.data.balance_sequences import balance_sequences
from qlora_trainer.data.order import permutation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from qlora_api.batch import BatchSplit
    from qlora_trainer.data.packing import Sequences
    from qlora_trainer.data.tokenized_rows import TokenizedRows

IGNORED = -100
"""The label that torch's and liger's cross entropy leave out by default."""

DUMMY_TOKENS = 16
"""Tokens of the row that fills an empty slot; more than one, since bitsandbytes takes another path for a single
token."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank: rows back to back in a single sequence of T tokens, without padding.

    Whether rows were packed makes no difference here: attention is cut at ``cu_seqlens`` (or where ``position_ids``
    restart), so rows never see each other.
    """

    input_ids: torch.Tensor
    """int64 [1, T]"""
    labels: torch.Tensor
    """int64 [1, T], already shifted: the token to predict at this position, the next one of the same row, or -100."""
    position_ids: torch.Tensor
    """int64 [1, T], from 0 in each row."""
    cu_seqlens: torch.Tensor
    """int32 [rows + 1]; where rows start, and T."""
    max_seqlen: int
    """Tokens of the longest row."""

    def to(self, device: torch.device | str) -> MicroBatch:
        """Copy to ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return MicroBatch(**moved)


@dataclass(frozen=True)
class Step:
    """One optimizer step, as one rank sees it."""

    micro_batches: list[MicroBatch]
    """This rank's, as many as there are gradient accumulation steps."""
    target_tokens: int
    """Labels that are not ignored, over all ranks: what the summed loss is divided by."""
    tokens: int
    """Real tokens over all ranks; those of dummies do not count."""
    rows: NDArray[np.int64]
    """Numbers of all ranks' rows, in an order that does not depend on the number of ranks."""


class Batches:
    """The training steps of one rank.

    Args:
        rows: all rows, the same on every rank.
        sequences: which rows go together.
        split: how a global batch is cut. Which sequences a step holds depends on their product only.
        rank: this process, from 0.
        seed: of the order.

    """

    def __init__(self, rows: TokenizedRows, sequences: Sequences, split: BatchSplit, rank: int, seed: int) -> None:
        self._rows = rows
        self._sequences = sequences
        self._split = split
        self._rank = rank
        self._seed = seed
        self._lengths = sequences.sums(rows.lengths)
        self._order: tuple[int, NDArray[np.int64]] | None = None  # (epoch, its order): one epoch is enough

    @property
    def steps_per_epoch(self) -> int:
        """Every sequence is used once an epoch; the last step may be smaller than the others."""
        return -(-len(self._sequences) // self._split.global_batch_size)

    def step(self, index: int) -> Step:
        """Step ``index`` of the run, from 0 and through all epochs."""
        epoch, place = divmod(index, self.steps_per_epoch)
        size = self._split.global_batch_size
        return self._step_of(self._epoch_order(epoch)[place * size : (place + 1) * size])

    def largest(self, count: int) -> Step:
        """This rank's ``count`` largest micro-batches of the largest step there can be: of the longest sequences.

        No step of any epoch holds more, in whatever order they come.
        """
        chosen = np.argsort(-self._lengths, kind="stable")[: self._split.global_batch_size]
        step = self._step_of(chosen)
        return replace(step, micro_batches=step.micro_batches[:count])

    def steps(self, first: int, stop: int) -> Iterator[Step]:
        """Yield steps ``[first, stop)``; the next one is built on a thread while the current one is used."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-step") as thread:
            ahead = thread.submit(self.step, first) if first < stop else None
            for index in range(first, stop):
                assert ahead is not None
                step = ahead.result()
                ahead = thread.submit(self.step, index + 1) if index + 1 < stop else None
                yield step

    def _step_of(self, chosen: NDArray[np.int64]) -> Step:
        """These sequences as one step."""
        slots = balance_sequences(self._lengths[chosen], self._split)[self._rank]
        members = np.concatenate([self._sequences.rows(i) for i in chosen])
        return Step(
            micro_batches=[_micro_batch(self._rows, self._sequences, chosen[slot]) for slot in slots],
            target_tokens=int(self._rows.target_counts[members].sum()),
            tokens=int(self._lengths[chosen].sum()),
            rows=members,
        )

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        known = self._order
        if known is None or known[0] != epoch:
            known = (epoch, permutation(len(self._sequences), (self._seed, epoch)))
            self._order = known
        return known[1]


def eval_batches(
    rows: TokenizedRows, sequences: Sequences, micro_batch_size: int, world_size: int, rank: int
) -> Iterator[MicroBatch]:
    """Yield one rank's share of the evaluation, in a fixed order.

    Over all ranks every sequence comes once; every rank gets the same number of micro-batches, the last one perhaps
    a dummy.
    """
    for chosen in eval_sequences(len(sequences), micro_batch_size, world_size, rank):
        yield _micro_batch(rows, sequences, chosen)


def eval_sequences(count: int, micro_batch_size: int, world_size: int, rank: int) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of the sequences in each micro-batch of :func:`eval_batches`; of a dummy, none."""
    everything = np.arange(count, dtype=np.int64)
    stride = micro_batch_size * world_size
    for start in range(0, count, stride):
        first = start + rank * micro_batch_size
        yield everything[first : first + micro_batch_size]


def _micro_batch(rows: TokenizedRows, sequences: Sequences, chosen: NDArray[np.int64]) -> MicroBatch:
    if not len(chosen):
        return _dummy(rows)
    members = [row for sequence in chosen for row in sequences.rows(sequence).tolist()]
    return _flatten([rows.row(row) for row in members])


def _dummy(rows: TokenizedRows) -> MicroBatch:
    """Keep ranks in step without adding to the loss: a few real tokens, every label ignored."""
    tokens = rows.row(0)[0][:DUMMY_TOKENS]
    return _flatten([(tokens, np.zeros(len(tokens), np.bool_))])


def _flatten(rows: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]]) -> MicroBatch:
    lengths = np.array([len(tokens) for tokens, _ in rows], dtype=np.int64)
    ends = np.cumsum(lengths)
    tokens = np.concatenate([tokens for tokens, _ in rows]).astype(np.int64)
    counts = np.concatenate([targets for _, targets in rows])
    labels = np.full(len(tokens), IGNORED, dtype=np.int64)
    # The first token of a row is never a target, so nothing is carried over from one row into the one before.
    labels[:-1][counts[1:]] = tokens[1:][counts[1:]]
    positions = np.arange(len(tokens), dtype=np.int64) - np.repeat(ends - lengths, lengths)
    return MicroBatch(
        input_ids=torch.from_numpy(tokens)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
    )
