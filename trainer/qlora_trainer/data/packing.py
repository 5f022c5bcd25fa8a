"""Choose the rows that share a sequence."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class Sequences:
    """Groups of rows; each row is in exactly one. What ``globalBatchSize`` counts."""

    members: NDArray[np.int64]
    """[rows]; row numbers, sequence after sequence."""
    offsets: NDArray[np.int64]
    """[sequences + 1]; sequence i holds ``members[offsets[i]:offsets[i + 1]]``."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self, index: int) -> NDArray[np.int64]:
        """Row numbers of one sequence."""
        return self.members[self.offsets[index] : self.offsets[index + 1]]

    def sums(self, values: NDArray[np.int32] | NDArray[np.int64]) -> NDArray[np.int64]:
        """[sequences]; a per-row quantity, such as the length, added up within each sequence."""
        return np.add.reduceat(values[self.members], self.offsets[:-1], dtype=np.int64)


def unpacked(count: int) -> Sequences:
    """Make each of ``count`` rows a sequence of its own."""
    return Sequences(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def _pairs(order: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (row, its length) in order; a list of all would take ten times the array's memory."""
    for start in range(0, len(order), CHUNK_ROWS):
        chunk = order[start : start + CHUNK_ROWS]
        yield from zip(chunk.tolist(), lengths[chunk].tolist(), strict=True)


def pack(lengths: NDArray[np.int64], capacity: int) -> Sequences:
    """Put rows into as few sequences of ``capacity`` tokens as best-fit decreasing finds.

    The longest row first, each into the fullest sequence that still has room (at most 11/9 of the best possible;
    Johnson 1974). Deterministic: rows of one length keep their order. Near O(n log n): sequences are found by the
    room that is left in them, and there are few different amounts of it.

    Args:
        lengths: [rows] in tokens, each at least 1.
        capacity: of a sequence, in tokens.

    Raises:
        ValueError: a row is longer than ``capacity``, or empty.

    """
    if len(lengths) and (lengths.max() > capacity or lengths.min() < 1):
        raise ValueError(f"rows of {lengths.min()} to {lengths.max()} tokens do not fit sequences of 1 to {capacity}")
    order = np.argsort(-lengths, kind="stable")
    sequence_of = np.empty(len(lengths), dtype=np.int64)
    with_room: dict[int, list[int]] = {}  # tokens left → sequences with just so many
    rooms: list[int] = []  # the keys of with_room, ascending
    opened = 0
    for row, length in _pairs(order, lengths):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, sequence = capacity, opened
            opened += 1
        else:
            room = rooms[at]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        sequence_of[row] = sequence
        left = room - length
        if left in with_room:
            with_room[left].append(sequence)
        elif left:
            with_room[left] = [sequence]
            insort(rooms, left)
    members = np.argsort(sequence_of, kind="stable")
    counts = np.bincount(sequence_of, minlength=opened)
    return Sequences(members.astype(np.int64), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
