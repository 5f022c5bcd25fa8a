"""Encode the rows of a source and write them to their split, with a tally of what happened to them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from qlora_api.spec import DatasetFormat, DatasetSpec, LongRows
from qlora_trainer.data.rows.errors import unexpected_problem
from qlora_trainer.data.rows.remarks import Remarks
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from qlora_trainer.data.formats import Encoded, EncodedRow, Encoder
    from qlora_trainer.data.rows.place import RowPlace
    from qlora_trainer.data.rows.read import Batch, Rows
    from qlora_trainer.data.tokenized_rows import RowWriter

REPORT_SECONDS = 10.0
TOKEN_BYTES = np.dtype(np.int32).itemsize
MEDIA = {name: f"<{kind}>" for kind in ("image", "video", "audio") for name in (kind, f"{kind}s")}
"""Columns of what is no text → the placeholder for it in the text (LLaMA-Factory, ms-swift)."""
log = logging.getLogger(__name__)


class Identities:
    """Rows by the hash of their tokens, eight bytes each; a collision among 64 bits only miscounts duplicates."""

    def __init__(self) -> None:
        self._hashes = np.zeros(1024, np.uint64)
        self._count = 0

    def add(self, data: bytes) -> None:
        if self._count == len(self._hashes):
            self._hashes = np.resize(self._hashes, 2 * self._count)
        self._hashes[self._count] = int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
        self._count += 1

    def repeated(self) -> int:
        """Count those that repeat an earlier one."""
        return self._count - len(np.unique(self._all))

    def also_in(self, other: Identities) -> int:
        """Count those that are in ``other`` too, each as often as it is here."""
        return int(np.isin(self._all, other._all).sum())

    @property
    def _all(self) -> NDArray[np.uint64]:
        return self._hashes[: self._count]


@dataclass
class Split:
    """Training or evaluation: the rows' files, and which rows were seen how often."""

    name: str
    writer: RowWriter
    seen: Identities = field(default_factory=Identities)
    prompts: Identities = field(default_factory=Identities)
    """Tokens before the first target token of each row that has such a prompt."""

    @property
    def duplicates(self) -> int:
        """Rows that repeat an earlier one."""
        return self.seen.repeated()

    def also_in(self, other: Split) -> int:
        """Rows that the other side has too, each as often as it is here."""
        return self.seen.also_in(other.seen)

    def prompts_also_in(self, other: Split) -> int:
        """Rows whose prompt the other side has too, with this answer or another."""
        return self.prompts.also_in(other.prompts)

    def add(self, encoded: Encoded) -> bool:
        """Write a row; False if no token of it counts."""
        written = self.writer.append(encoded.input_ids, encoded.targets)
        if written is None:
            return False
        self.seen.add(written)
        prompt = encoded.targets.index(True)
        if prompt > 1:  # the first token never counts
            self.prompts.add(written[: prompt * TOKEN_BYTES])
        return True


@dataclass
class Tally:
    """Counts of the rows of one source, by what happened to them; some count the examples that rows gave."""

    rows: int = 0
    with_tools: int = 0
    """Rows whose tools the chat template writes."""
    split: int = 0
    """Rows that gave several examples."""
    left_out: int = 0
    """Rows of which the chat template leaves something out."""
    empty_turns: int = 0
    """Messages of the assistant of which nothing is written."""
    truncated: int = 0
    dropped: int = 0
    fully_masked: int = 0
    longest: int = 0
    longest_row: RowPlace | None = None
    too_long: int = 0
    remarks: Remarks = field(default_factory=Remarks)
    unread: frozenset[str] = frozenset()
    """Columns that are not read."""

    def count_row(self, row: EncodedRow, place: RowPlace) -> None:
        """Note one row."""
        self.remarks.add(row.remarks, place)
        self.rows += 1
        self.with_tools += row.tools
        self.split += len(row.examples) > 1
        self.left_out += bool(row.left_out or row.empty)
        self.empty_turns += row.empty
        self.fully_masked += not row.examples

    def count(self, encoded: Encoded, number: RowPlace, most: int) -> None:
        """Note one example before anything is decided about it."""
        self.truncated += encoded.truncated
        self.too_long += encoded.full_length > most
        if encoded.full_length > self.longest:
            self.longest, self.longest_row = encoded.full_length, number


def collect(encoder: Encoder, rows: Rows, where: str, side_of: Callable[[int], Split]) -> Tally:
    """Encode all rows of a source and write each to its side.

    Args:
        encoder: of the dataset.
        rows: of one source; no more than a batch of them is held.
        where: the source in words, for errors.
        side_of: number of a row, from 0 → the side that it belongs to.

    Raises:
        UserError: a row that cannot be encoded, or, after all have been looked at, rows that are too long.

    """
    dataset = encoder.dataset
    tally = Tally()
    progress = _EncodingProgress(where, rows.source.size)
    for batch in rows.batches():
        tally.unread = batch.unread
        if MEDIA.keys() & batch.unread:
            _check_placeholders(batch, dataset)
        for place, row in zip(batch.places, _encoded(encoder, batch), strict=True):
            tally.count_row(row, place)
            for encoded in row.examples:
                tally.count(encoded, place, dataset.max_length)
                if len(encoded.input_ids) > dataset.max_length:  # Fail and Drop; Truncate has cut it
                    tally.dropped += 1
                elif not side_of(place.number - 1).add(encoded):
                    tally.fully_masked += 1
        progress.tell(tally.rows, batch.done)
    if tally.too_long and dataset.long_rows is LongRows.FAIL:
        raise _too_long(dataset, tally, where)
    return tally


def _check_placeholders(batch: Batch, dataset: DatasetSpec) -> None:
    """Refuse rows that speak of what is in their cell of images and the like: a model would learn to make it up.

    Raises:
        UserError: names the first row.

    """
    for place, cells, filled in zip(batch.places, batch.rows, batch.filled, strict=True):
        text = str(cells) if filled else ""
        for column in sorted(filled):
            if (placeholder := MEDIA[column]) in text:
                first = dataset.required_columns
                raise UserError(
                    next(iter(first.values())),
                    next(iter(first)),
                    f"must hold text alone; row {place} has the placeholder {placeholder} for what is in the column"
                    f" {column}, and models are trained on text: leave such rows or that column out",
                )


def _encoded(encoder: Encoder, batch: Batch) -> list[EncodedRow]:
    """Encode a batch; an error that no row should cause is told by its type, since its text may quote the row.

    Raises:
        UserError: a row that cannot be encoded.

    """
    try:
        return encoder.encode_batch(batch.rows, batch.places)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001
        for place, row in zip(batch.places, batch.rows, strict=True):
            try:
                encoder.encode_batch([row], [place])
            except UserError:
                raise
            except Exception as own:  # noqa: BLE001
                raise _unexpected(own, f"row {place}") from None
        raise _unexpected(error, f"rows {batch.places[0]} to {batch.places[-1]}") from None


def _unexpected(error: BaseException, where: str) -> UserError:
    return UserError("spec.dataset", None, f"{where} cannot be made into tokens: {unexpected_problem(error)}")


class _EncodingProgress:
    """Says now and then how far the rows are, at what rate, and how long it may take."""

    def __init__(self, where: str, size: int) -> None:
        self._where = where
        self._size = size
        self._begin = self._told = time.monotonic()

    def tell(self, rows: int, done: int) -> None:
        now = time.monotonic()
        if now - self._told >= REPORT_SECONDS:
            self._told = now
            log.info("%s", progress_line(self._where, rows, done, self._size, now - self._begin))


def progress_line(where: str, rows: int, done: int, size: int, seconds: float) -> str:
    """Say how far the rows of a source are.

    Args:
        where: the source.
        rows: that are tokenized.
        done: bytes of its files that were read.
        size: bytes of its files.
        seconds: since it began.

    """
    left = (size - done) * seconds / done if done else 0.0
    return (
        f"{where}: {rows:,} rows, {done / 1e6:,.0f} of {size / 1e6:,.0f} MB, {done / 1e6 / seconds:.1f} MB/s, about"
        f" {left / 60:.0f} min left"
    )


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
