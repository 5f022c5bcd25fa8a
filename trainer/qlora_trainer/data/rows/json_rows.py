"""Rows of JSON: one object a line, one array of objects, or objects one after another. One row is held at a time.

By the standard library, since pyarrow's reader wants one type for each column and tool calls have many.
"""

from __future__ import annotations

import codecs
import json
from typing import TYPE_CHECKING, Any

from qlora_trainer.data.rows.conversation import json_type
from qlora_trainer.data.rows.errors import SURROGATE, SURROGATE_PROBLEM, RowsError
from qlora_trainer.data.rows.limits import MOST_ROW_BYTES, too_large
from qlora_trainer.data.rows.text_stream import TextStream, open_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlora_trainer.data.rows.source import SourceFile

PIECE_BYTES = 1 << 16
SPACE = " \t\r\n"

JsonRow = tuple[str, dict[str, Any], int, int]
"""(where it is in the file, cells, bytes of it, bytes of the file read so far)"""


def read_json(file: SourceFile) -> Iterator[JsonRow]:
    """Read the rows of one file.

    Raises:
        RowsError: names the file and the line, or the element of the array.

    """
    with open_text(file) as stream:
        number = stream.skip_space()
        if stream.starts_with(b"["):
            yield from _Values(stream, b"").rows()
            return
        first = True
        while line := _line(stream, number + 1):
            number += 1
            if line.isspace():
                continue
            if first and _goes_on(line):
                yield from _Values(stream, line).rows()
                return
            first = False
            where = f"line {number}"
            yield where, _row(stream.name, where, line), len(line), stream.consumed


def _line(stream: TextStream, number: int) -> bytes:
    try:
        return stream.line()
    except RowsError as error:
        raise _named(stream.name, f"line {number}", error) from None


def _goes_on(line: bytes) -> bool:
    """Return True if the object that begins in this line ends in a later one."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


def _row(name: str, where: str, line: bytes) -> dict[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise RowsError(f"{name}, {where}: is no UTF-8 text at byte {error.start + 1} of the line") from None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise RowsError(f"{name}, {where}: {json_problem(error)}") from None
    return check_row(row, name, where, suspicious=SURROGATE.search(text) is not None)


def check_row(row: Any, name: str, where: str, *, suspicious: bool) -> dict[str, Any]:
    """Return the row if it is an object of texts that can be written.

    Raises:
        RowsError: it is none, or has half of a surrogate pair.

    """
    if not isinstance(row, dict):
        raise RowsError(f'{name}, {where}: must be an object such as {{"text": "…"}}, not {json_type(row)}')
    if suspicious:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RowsError(f"{name}, {where}: {SURROGATE_PROBLEM}") from None
    return row


def json_problem(error: BaseException) -> str:
    """Say what is wrong with JSON without quoting it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    if isinstance(error, RecursionError):
        return "is nested too deep; about a thousand levels are read"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    return "has a number of more than 4,300 digits" if "digits" in str(error) else "is no JSON"


def _named(name: str, where: str, error: RowsError) -> RowsError:
    text = str(error)
    return error if text.startswith(f"{name}: ") else RowsError(f"{name}, {where}: {text}")


class _Values:
    """An array of objects, or objects one after another, of which one is held at a time."""

    def __init__(self, stream: TextStream, start: bytes) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._at = 0
        self._text = ""
        self._number = 0
        self._text = self._decode(start, final=False)

    def rows(self) -> Iterator[JsonRow]:
        array = self._peek() == "["
        self._at += array
        while (char := self._peek()) != ("]" if array else ""):
            self._number += 1
            if array and self._number > 1:
                self._take_comma(char)
            where = f"{'element' if array else 'object'} {self._number}"
            row, suspicious, size = self._value(where)
            yield where, check_row(row, self._stream.name, where, suspicious=suspicious), size, self._stream.consumed
        self._at += array
        if array and self._peek():
            raise RowsError(f"{self._stream.name}: has more after its array")

    def _take_comma(self, char: str) -> None:
        if char != ",":
            raise RowsError(f"{self._stream.name}, element {self._number - 1}: must be followed by a comma or ]")
        self._at += 1
        self._peek()

    def _value(self, where: str) -> tuple[Any, bool, int]:
        """(value, whether it may have surrogates, characters of it)."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > MOST_ROW_BYTES:
                    raise RowsError(f"{self._stream.name}, {where}: {too_large()}") from None
                if not self._more(max(PIECE_BYTES, len(self._text) - self._at)):
                    raise RowsError(f"{self._stream.name}, {where}: {error.msg}") from None
            except (ValueError, RecursionError, MemoryError) as error:
                raise RowsError(f"{self._stream.name}, {where}: {json_problem(error)}") from None
            else:
                size = end - self._at
                suspicious = SURROGATE.search(self._text, self._at, end) is not None
                self._at = end
                return value, suspicious, size

    def _peek(self) -> str:
        """Return the next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(PIECE_BYTES):
                return ""

    def _more(self, size: int) -> bool:
        """Read on; False at the end of the file."""
        piece = self._stream.piece(size)
        self._text = self._text[self._at :] + self._decode(piece, final=not piece)
        self._at = 0
        return bool(piece)

    def _decode(self, piece: bytes, *, final: bool) -> str:
        try:
            return self._decoder.decode(piece, final)
        except UnicodeDecodeError:
            where = f"after element {self._number}" if self._number else "at its beginning"
            raise RowsError(f"{self._stream.name}: is no UTF-8 text {where}") from None
