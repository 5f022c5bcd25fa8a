"""Rows of one source through the encoder and into the files of their side, with a tally of what happened to them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora_api.spec import DatasetFormat, DatasetSpec, LongRows
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qlora_trainer.data.formats import Encoded, Encoder
    from qlora_trainer.data.sources import Rows
    from qlora_trainer.data.tokenized_rows import RowWriter

CHUNK_ROWS = 512
"""Given to the tokenizer at once: enough for all cores, little enough to hold many long rows."""


@dataclass
class Split:
    """Training or evaluation: the rows' files, and which rows were seen how often."""

    name: str
    writer: RowWriter
    seen: Counter[int] = field(default_factory=Counter)
    """Rows by the hash of their tokens; a collision among 64 bits only miscounts duplicates."""

    @property
    def duplicates(self) -> int:
        """Rows that repeat an earlier one."""
        return self.seen.total() - len(self.seen)

    def also_in(self, other: Split) -> int:
        """Rows that the other side has too, each as often as it is here."""
        return sum(count for identity, count in self.seen.items() if identity in other.seen)

    def add(self, encoded: Encoded) -> bool:
        """Write a row; False if no token of it counts."""
        written = self.writer.append(encoded.input_ids, encoded.targets)
        if written is None:
            return False
        self.seen[hash(written)] += 1
        return True


@dataclass
class Tally:
    """Counts of the rows of one source, by what happened to them."""

    rows: int = 0
    truncated: int = 0
    dropped: int = 0
    fully_masked: int = 0
    longest: int = 0
    longest_row: int = 0
    """Number of the longest row, from 1."""
    too_long: int = 0

    def count(self, encoded: Encoded, number: int, most: int) -> None:
        """Note one row before anything is decided about it."""
        self.rows += 1
        self.truncated += encoded.truncated
        self.too_long += encoded.full_length > most
        if encoded.full_length > self.longest:
            self.longest, self.longest_row = encoded.full_length, number


def collect(encoder: Encoder, rows: Rows, where: str, side_of: Callable[[int], Split]) -> Tally:
    """Encode all rows of a source and write each to its side.

    Args:
        encoder: of the dataset.
        rows: of one source.
        where: the source in words, for errors.
        side_of: number of a row, from 0 → the side that it belongs to.

    Raises:
        UserError: a row that cannot be encoded, or, after all have been looked at, rows that are too long.

    """
    dataset = encoder.dataset
    tally = Tally()
    for start, batch in rows.batches(CHUNK_ROWS):
        for number, encoded in enumerate(
            encoder.encode_batch(batch, range(start + 1, start + 1 + len(batch))), start=start
        ):
            tally.count(encoded, number + 1, dataset.max_length)
            if len(encoded.input_ids) > dataset.max_length:  # Fail and Drop; Truncate has cut it
                tally.dropped += 1
            elif not side_of(number).add(encoded):
                tally.fully_masked += 1
    if tally.too_long and dataset.long_rows is LongRows.FAIL:
        raise _too_long(dataset, tally, where)
    return tally


def require_rows(side: Split, dataset: DatasetSpec, tally: Tally, where: str) -> None:
    """Refuse a side that nothing can be learned or measured from: its loss would be a silent zero (trl#6668).

    Raises:
        UserError: says why no row is left, and what to change.

    """
    if side.writer.rows:
        return
    raise UserError(
        "spec.dataset",
        None,
        f"all labels are masked: none of the {side.name} rows has a token that counts for the loss. {where} has"
        f" {tally.rows} rows; {tally.dropped} are left out as longer than maxLength {dataset.max_length},"
        f" {tally.truncated} are cut there, and in {tally.fully_masked} no token counts. {_remedy(dataset, tally)}",
    )


def _remedy(dataset: DatasetSpec, tally: Tally) -> str:
    if tally.dropped or tally.truncated:
        return (
            f"Raise spec.dataset.maxLength (the longest row has {tally.longest} tokens) or shorten the rows, so that"
            " what is to be learned is not cut off"
        )
    if dataset.format is DatasetFormat.MESSAGES:
        return (
            'Check that the rows have messages of role "assistant" and that the chat template marks or writes them, or'
            " set spec.dataset.lossOn to All"
        )
    return "Check that spec.dataset.columns names the right columns and that their texts are not empty"


def _too_long(dataset: DatasetSpec, tally: Tally, where: str) -> UserError:
    return UserError(
        "spec.dataset.maxLength",
        dataset.max_length,
        f"must be at least {tally.longest}: {tally.too_long} of the {tally.rows} rows of {where} are longer, the"
        f" longest is row {tally.longest_row} with {tally.longest} tokens. Raise maxLength, or set"
        " spec.dataset.longRows to Truncate (these lose their tail) or Drop (they are left out)",
    )
