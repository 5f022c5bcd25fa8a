"""Tokenized rows on disk: flat arrays that every rank of a machine maps into memory once.

A folder holds ``tokens.npy`` (int32), ``targets.npy`` (bool), ``offsets.npy`` (int64) and ``target_counts.npy``
(int32); beside them, sequences as ``members.npy`` and ``starts.npy``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from qlora_trainer.data.packing import Sequences

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenizedRows:
    """Rows of tokens, back to back; row i is ``[offsets[i], offsets[i + 1])``.

    No row is empty of targets, and the first token of a row is never one: nothing stands before it to predict it from.
    """

    tokens: NDArray[np.int32]
    """[tokens of all rows]"""
    targets: NDArray[np.bool_]
    """[tokens of all rows]; True: the token is to be predicted."""
    offsets: NDArray[np.int64]
    """[rows + 1]"""
    target_counts: NDArray[np.int32]
    """[rows]; targets of each row."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """(tokens, targets) of one row, both [length]; views, not to be written to."""
        start, stop = self.offsets[index], self.offsets[index + 1]
        return self.tokens[start:stop], self.targets[start:stop]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[rows] in tokens."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Self:
        """Hold rows in memory, for what is not worth a file; same rules as :meth:`RowWriter.append`."""
        arrays = [_as_arrays(tokens, targets) for tokens, targets in rows]
        return cls(
            np.concatenate([tokens for tokens, _ in arrays]),
            np.concatenate([targets for _, targets in arrays]),
            np.cumsum([0] + [len(tokens) for tokens, _ in arrays], dtype=np.int64),
            np.array([targets.sum() for _, targets in arrays], dtype=np.int32),
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Map the arrays of ``folder``; nothing is read yet."""
        names = ("tokens", "targets", "offsets", "target_counts")
        return cls(*(_map(folder / f"{name}.npy") for name in names))


class RowWriter:
    """Writes a folder of rows one by one, so that a set may be larger than memory. A context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._tokens = _GrowingArray(folder / "tokens.npy", np.dtype(np.int32))
        self._targets = _GrowingArray(folder / "targets.npy", np.dtype(np.bool_))
        self._offsets = _GrowingArray(folder / "offsets.npy", np.dtype(np.int64))
        self._target_counts = _GrowingArray(folder / "target_counts.npy", np.dtype(np.int32))
        self._offsets.append(np.zeros(1, np.int64))
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for array in (self._tokens, self._targets, self._offsets, self._target_counts):
            array.close()

    def append(self, tokens: Sequence[int], targets: Sequence[bool]) -> bytes | None:
        """Write a row, unless nothing in it can be learned.

        Returns:
            The tokens as bytes, to recognize the row by; None if no token counts and the row was left out.

        """
        ids, counts = _as_arrays(tokens, targets)
        if not counts.any():
            return None
        self._tokens.append(ids)
        self._targets.append(counts)
        self._offsets.append(np.array([self._tokens.length], np.int64))
        self._target_counts.append(np.array([counts.sum()], np.int32))
        self.rows += 1
        return ids.tobytes()


def save_sequences(sequences: Sequences, folder: Path) -> None:
    """Write the sequences beside their rows."""
    for name, array in (("members", sequences.members), ("starts", sequences.offsets)):
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, array)
            _flush(file)


def load_sequences(folder: Path) -> Sequences:
    """Map what :func:`save_sequences` wrote."""
    return Sequences(members=_map(folder / "members.npy"), offsets=_map(folder / "starts.npy"))


def _as_arrays(tokens: Sequence[int], targets: Sequence[bool]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    counts = np.array(targets, dtype=np.bool_)
    counts[:1] = False
    return np.array(tokens, dtype=np.int32), counts


def _map(path: Path) -> NDArray[Any]:
    # A plain view: slicing a numpy.memmap costs five times as much, and a step slices hundreds of rows.
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)


class _GrowingArray:
    """A one-dimensional .npy file of a length that is known at the end.

    numpy leaves room in the header for the first axis to grow (``numpy.lib.format``: "so that array can be extended
    in-place"), so the header is written twice and has the same size both times.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file = path.open("wb")
        self._dtype = dtype
        self.length = 0
        self._write_header()
        self._data_start = self._file.tell()

    def append(self, values: NDArray[Any]) -> None:
        self._file.write(values.tobytes())
        self.length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._data_start, "numpy's header grew over the data"
        _flush(self._file)
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _flush(file: IO[bytes]) -> None:
    """To the disk itself: the rename that follows must not overtake the data."""
    file.flush()
    os.fsync(file.fileno())
