"""Rows of CSV and TSV: every cell is text, "007" stays "007", and an empty cell is an empty text."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from qlora_trainer.data.rows.errors import RowsError
from qlora_trainer.data.rows.limits import MOST_ROW_BYTES, too_large
from qlora_trainer.data.rows.text_stream import TextStream, open_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlora_trainer.data.rows.json_rows import JsonRow
    from qlora_trainer.data.rows.source import SourceFile

BYTE_ORDER_MARK = "\ufeff"


def read_csv(file: SourceFile) -> Iterator[JsonRow]:
    """Read the rows of one file; the first line is the header.

    Raises:
        RowsError: names the file and the line.

    """
    csv.field_size_limit(MOST_ROW_BYTES)  # of the process; its default is shorter than long documents
    with open_text(file) as stream:
        lines = _Lines(stream)
        tabs = ".tsv" in file.name.lower()
        reader = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
        header = _next(reader, lines)
        if header is None:
            return
        if len(set(header)) < len(header):
            raise RowsError(f"{file.name}, line 1: has a column twice")
        while (cells := _next(reader, lines)) is not None:
            if len(cells) != len(header):
                raise RowsError(f"{lines.where}: Expected {len(header)} columns, got {len(cells)}")
            _check_one_file(cells, header, lines)
            if tabs:
                _check_one_row(header, lines)
            yield f"line {lines.first}", dict(zip(header, cells, strict=True)), lines.size, stream.consumed


def _check_one_file(cells: list[str], header: list[str], lines: _Lines) -> None:
    """Refuse what stands between files that were put one after another: a byte order mark, or the header again."""
    if cells[0].startswith(BYTE_ORDER_MARK) or (len(header) > 1 and cells == header):
        raise RowsError(f"{lines.where}: is the beginning of another file; put each file there by itself")


def _check_one_row(header: list[str], lines: _Lines) -> None:
    """Refuse a quoted cell over several lines each of which has all columns: most TSV is written without quotes."""
    if len(lines.tabs) > 1 and len(header) > 1 and set(lines.tabs) == {len(header) - 1}:
        raise RowsError(
            f"{lines.where}: has a cell that begins with a quotation mark, which ends {len(lines.tabs) - 1} lines "
            "below, and each of these lines has all columns. If they are rows, put such cells in quotation marks, and "
            'write those inside twice (""); or write JSON Lines'
        )


def _next(reader: Iterator[list[str]], lines: _Lines) -> list[str] | None:
    """Return the next row that is not blank; None at the end."""
    while True:
        lines.begin_row()
        try:
            cells = next(reader, None)
        except csv.Error as error:  # its messages are fixed texts
            raise RowsError(f"{lines.where}: {error}") from None
        if cells is None or cells:
            return cells


class _Lines:
    """Lines for the csv module, no more for one row than a row may have."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._number = 0
        self.first = 1
        """Number of the line in which the row begins."""
        self.size = 0
        """Bytes of the row so far."""
        self.tabs: list[int] = []
        """Number of tabs in each line of the row."""

    @property
    def where(self) -> str:
        return f"{self._stream.name}, line {self.first}"

    def begin_row(self) -> None:
        self.first = self._number + 1
        self.size = 0
        self.tabs = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._line()
        self._number += 1
        self.size += len(line)
        if not line:
            raise StopIteration
        if self.size > MOST_ROW_BYTES:
            raise RowsError(f"{self.where}: {too_large()}")
        self.tabs.append(line.count(b"\t"))
        try:
            return line.decode()
        except UnicodeDecodeError:
            raise RowsError(f"{self._stream.name}, line {self._number}: is no UTF-8 text") from None

    def _line(self) -> bytes:
        try:
            return self._stream.line()
        except RowsError as error:
            text = str(error)
            raise error if text.startswith(f"{self._stream.name}: ") else RowsError(f"{self.where}: {text}") from None
