"""A text file as UTF-8 bytes, whatever it is compressed and encoded with, in bounded memory."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qlora_trainer.data.rows.errors import RowsError
from qlora_trainer.data.rows.limits import MOST_ROW_BYTES, most_bytes, too_expanded, too_large
from qlora_trainer.row_files import compression_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlora_trainer.data.rows.source import SourceFile

BUFFER_BYTES = 1 << 20
NAMES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2"}
PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    b"PK\x03\x04": "ZIP",
    b"PAR1": "Parquet",
    b"ARROW1\0\0": "Arrow",
}
"""First bytes of files that are no text."""
WIDE = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32"}


@contextmanager
def open_text(file: SourceFile) -> Iterator[TextStream]:
    """Open a file for reading by lines, and check at the end that it has not changed meanwhile.

    Raises:
        RowsError: it is no such file, or too large for one.

    """
    with file.open() as raw:
        yield TextStream(file, raw)
        file.check(raw)


class TextStream:
    """Lines and pieces of a file. Every method may raise RowsError."""

    def __init__(self, file: SourceFile, raw: io.BufferedReader) -> None:
        self.name = file.name
        self._raw = raw
        plain: io.RawIOBase = _Decompressed(file, raw)
        buffered = io.BufferedReader(plain, BUFFER_BYTES)
        self._stream = self._decoded(buffered)

    @property
    def consumed(self) -> int:
        """Bytes of the file itself that were read."""
        return self._raw.tell()

    def skip_space(self) -> int:
        """Skip what is blank at the beginning, and return the number of line ends in it."""
        ends = 0
        while (ahead := self._stream.peek(1)) and ahead[:1].isspace():
            blank = self._stream.read(len(ahead) - len(ahead.lstrip()))
            ends += blank.count(b"\n")
        return ends

    def starts_with(self, char: bytes) -> bool:
        return self._stream.peek(1)[:1] == char

    def line(self) -> bytes:
        """Read a line with its end; empty at the end of the file."""
        line = self._stream.readline(MOST_ROW_BYTES + 1)
        if len(line) > MOST_ROW_BYTES:
            raise RowsError(too_large())
        return line

    def piece(self, size: int) -> bytes:
        """Read about as many bytes; empty at the end of the file."""
        return self._stream.read1(size)

    def _decoded(self, stream: io.BufferedReader[Any]) -> io.BufferedReader[Any]:
        head = stream.peek(4)
        if packed := next((kind for first, kind in PACKED.items() if head.startswith(first)), None):
            raise RowsError(f"{self.name}: is no text, but a {packed} file; give it a name of such files, or unpack it")
        start = head[:4]
        if start[:3] == codecs.BOM_UTF8:
            stream.read(3)
        elif wide := WIDE.get(start):
            raise RowsError(f"{self.name}: is in {wide}; save it as UTF-8")
        elif start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return io.BufferedReader(_FromUtf16(self.name, stream), BUFFER_BYTES)
        elif b"\0" in start:
            raise RowsError(
                f"{self.name}: is no UTF-8 text, perhaps UTF-16 without a byte order mark; save it as UTF-8"
            )
        return stream


class _Readable(io.RawIOBase):
    """A raw stream made of pieces."""

    def __init__(self) -> None:
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = self._next(len(buffer))
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def _next(self, size: int) -> bytes:
        """Return the next piece, of about that size; empty at the end."""
        raise NotImplementedError


class _Decompressed(_Readable):
    """The bytes in a file, as many as it may hold."""

    def __init__(self, file: SourceFile, raw: io.BufferedReader) -> None:
        super().__init__()
        self._file = file
        suffix = compression_of(file.name)
        self._compression = NAMES[suffix] if suffix else None
        self._source: Any = raw
        match suffix:
            case ".gz":
                self._source = gzip.GzipFile(fileobj=raw)
            case ".bz2":
                self._source = _Bzip2(raw)
            case ".zst":  # its window is bounded by libzstd: 128 MiB
                self._source = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
        self._most = most_bytes(file.size) if suffix else file.size
        self._given = 0

    def _next(self, size: int) -> bytes:
        try:
            piece: bytes = self._source.read(size)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            problem = "is cut off" if isinstance(error, EOFError) else "is damaged"
            text = f"{problem}, or no {self._compression} file" if self._compression else "cannot be read"
            raise RowsError(f"{self._file.name}: {text}") from error
        self._given += len(piece)
        if self._given > self._most and self._compression:
            raise RowsError(f"{self._file.name}: {too_expanded(self._file.size)}")
        return piece


class _Bzip2:
    """The streams of a bzip2 file. The standard library's reader takes what is no stream for the end of the file."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw = raw
        self._stream = bz2.BZ2Decompressor()

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes; none at the end.

        Raises:
            OSError, EOFError: the file is damaged, or cut off.

        """
        piece = b""
        while not piece:
            data = b""
            if self._stream.eof:
                if not (data := self._stream.unused_data or self._raw.read(BUFFER_BYTES)):
                    return b""
                self._stream = bz2.BZ2Decompressor()
            elif self._stream.needs_input and not (data := self._raw.read(BUFFER_BYTES)):
                raise EOFError
            piece = self._stream.decompress(data, size)
        return piece


class _FromUtf16(_Readable):
    """UTF-16 with a byte order mark, as UTF-8."""

    def __init__(self, name: str, source: io.BufferedReader[Any]) -> None:
        super().__init__()
        self._name = name
        self._source = source
        self._decoder = codecs.getincrementaldecoder("utf-16")()

    def _next(self, size: int) -> bytes:
        text = ""
        while not text:
            piece = self._source.read1(size)
            try:
                text = self._decoder.decode(piece, final=not piece)
            except UnicodeDecodeError:
                raise RowsError(f"{self._name}: is no UTF-16, though it begins with its byte order mark") from None
            if not piece:
                break
        return text.encode()
