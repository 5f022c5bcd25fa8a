"""Read Parquet and Arrow files in a process of bounded memory: ``python -m qlora_trainer.data.rows.arrow_worker``.

Their sizes, offsets and nesting are what the file says, and the readers are native code: what overruns or crashes must
be this process alone. It has no credentials in its environment. It is given files and columns as JSON on its input and
writes lines of JSON, each a list of: what it is (a :class:`WorkerLine`), and what follows there.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pa_parquet

from qlora_trainer.data.rows.errors import SURROGATE_PROBLEM
from qlora_trainer.data.rows.limits import MOST_ROW_BYTES, READER_MEMORY_BYTES, most_bytes, too_expanded, too_large

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BATCH_ROWS = 256
SLICE_BYTES = 4 << 20
SLICE_VALUES = 1 << 18
MOST_ROW_VALUES = MOST_ROW_BYTES // 2
"""Each takes two characters of JSON at least."""
PAGE_BUFFER_BYTES = 1 << 20
FILE_MAGIC = b"ARROW1"
FILE_HEADER_BYTES = 8
FOOTER_LENGTH_BYTES = 4
TRAILER_BYTES = FOOTER_LENGTH_BYTES + len(FILE_MAGIC)
END_MARK_BYTES = 8
PARQUET_MAGIC = b"PAR1"
PARQUET_TRAILER_BYTES = 4 + len(PARQUET_MAGIC)
KNOWN_PROBLEMS = (
    "Parquet magic bytes not found in footer",
    "Couldn't deserialize thrift",
    "Unexpected end of stream",
    "Not an Arrow file",
    "Invalid flatbuffers message",
    "Expected to read",
    "Corrupt snappy compressed data",
    "ZSTD decompression failed",
    "Parquet file size is",
)
"""Beginnings of pyarrow's messages that quote nothing of a row."""


class WorkerLine(StrEnum):
    FILE = "file"
    """number of the file, its columns"""
    ROW = "row"
    """number of the row in the file from 1, bytes of the file read so far, cells by column"""
    PROBLEM = "problem"
    """number of the file from 0, number of the row or None, what is wrong"""


class _RowProblemError(Exception):
    """(number of the row from 1 or None, what is wrong)."""


def main() -> int:
    resource.setrlimit(resource.RLIMIT_DATA, (READER_MEMORY_BYTES, READER_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = json.loads(sys.stdin.buffer.read())
    for number, (path, device, inode, size) in enumerate(request["files"]):
        try:
            _send_file(number, path, (device, inode), size, request["columns"])
        except _RowProblemError as error:
            _send(WorkerLine.PROBLEM, number, *error.args)
            break
        except Exception as error:  # noqa: BLE001 whatever it is, it is told without the text of a row
            _send(WorkerLine.PROBLEM, number, None, _problem(error))
            break
    sys.stdout.flush()
    return 0


def _send(*line: Any) -> int:
    text = json.dumps(line, ensure_ascii=False, default=_refuse)
    return sys.stdout.write(f"{text}\n")


def _refuse(value: object) -> None:
    raise _RowProblemError(None, f"has a value of type {type(value).__name__}, which JSON has not")


def _send_file(number: int, path: str, identity: tuple[int, int], size: int, columns: list[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if (found.st_dev, found.st_ino) != identity or Path(f"/proc/self/fd/{descriptor}").readlink() != Path(path):
        raise _RowProblemError(None, "changed while it was read")
    names, batches = _open(descriptor)
    if len(names) > len(set(names)):
        raise _RowProblemError(None, "has a column twice")
    wanted = [name for name in columns if name in names]
    _send(WorkerLine.FILE, number, names)
    row, sent = 0, 0
    for batch, done in batches(wanted):
        for cells in _rows(batch, row):
            row += 1
            written = _send_row(row, done, cells)
            sent += written
            if sent > most_bytes(size):
                raise _RowProblemError(None, too_expanded(size))
    os.close(descriptor)


def _send_row(row: int, done: int, cells: dict[str, Any]) -> int:
    try:
        text = json.dumps([WorkerLine.ROW, row, done, cells], ensure_ascii=False, default=_refuse)
    except _RowProblemError as error:
        raise _RowProblemError(row, error.args[1]) from None
    except (RecursionError, ValueError):
        raise _RowProblemError(row, "is nested too deep") from None
    if len(text) > MOST_ROW_BYTES:
        raise _RowProblemError(row, too_large())
    try:
        return sys.stdout.write(f"{text}\n")
    except UnicodeEncodeError:  # of a column of JSON
        raise _RowProblemError(row, SURROGATE_PROBLEM) from None


def _open(descriptor: int) -> tuple[list[str], Any]:
    """(columns, function from wanted columns to batches with the bytes of the file read so far)."""
    file = os.fdopen(descriptor, "rb", closefd=False)
    magic = file.read(len(FILE_MAGIC))
    file.seek(0)
    if magic[: len(PARQUET_MAGIC)] == PARQUET_MAGIC:
        parquet = pa_parquet.ParquetFile(file, buffer_size=PAGE_BUFFER_BYTES, pre_buffer=False)
        _check_one_parquet(parquet.metadata, descriptor)
        return parquet.schema_arrow.names, lambda wanted: _parquet_batches(parquet, wanted, file)
    mapped = pa.memory_map(f"/proc/self/fd/{descriptor}")
    reader = pa.ipc.open_file(mapped) if magic == FILE_MAGIC else pa.ipc.open_stream(mapped)
    return reader.schema.names, lambda wanted: _arrow_batches(reader, wanted, mapped)


def _check_one_parquet(metadata: Any, descriptor: int) -> None:
    """Find out that there is one file: of files one after another, the last footer's would be read from the first."""
    chunks = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    starts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset)), default=0) for c in chunks]
    end = max((start + c.total_compressed_size for start, c in zip(starts, chunks, strict=True)), default=0)
    if end + metadata.serialized_size + PARQUET_TRAILER_BYTES >= os.fstat(descriptor).st_size:
        return
    # Indexes of pages lie between rows and footer, too: only where there is more than rows is the file searched.
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as whole:
        if whole.find(PARQUET_MAGIC * 2) >= 0:
            raise _RowProblemError(None, "has more than its footer lists; several Parquet files must be in a file each")


def _parquet_batches(parquet: Any, wanted: list[str], file: Any) -> Iterator[tuple[Any, int]]:
    for batch in parquet.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False):
        yield batch.select(wanted), file.tell()


def _arrow_batches(reader: Any, wanted: list[str], mapped: Any) -> Iterator[tuple[Any, int]]:
    stream = isinstance(reader, pa.ipc.RecordBatchStreamReader)
    batches = reader if stream else (reader.get_batch(i) for i in range(reader.num_record_batches))
    end = mapped.tell()
    for batch in batches:
        end = mapped.tell()
        chosen = batch.select(wanted)
        chosen.validate(full=True)  # offsets are what the file says
        yield chosen, end
    if stream:
        _check_stream_end(mapped, end)
    else:
        _check_one_file(mapped, reader.num_record_batches)


def _check_stream_end(mapped: Any, end_of_batches: int) -> None:
    """Find out that the reader has come to the end mark, and that this is the end: it takes an end without one, too."""
    if mapped.tell() == end_of_batches:
        raise _RowProblemError(None, "is cut off, or its writer was not closed: it has no end mark")
    if mapped.tell() < mapped.size():
        raise _RowProblemError(None, "has more after its end; several streams must be in a file each")


def _check_one_file(mapped: Any, batches: int) -> None:
    """Find out that all that is before the footer is what it lists: of files one after another, one would be read."""
    footer_length = int.from_bytes(mapped.read_at(FOOTER_LENGTH_BYTES, mapped.size() - TRAILER_BYTES), "little")
    mapped.seek(FILE_HEADER_BYTES)
    messages = pa.ipc.MessageReader.open_stream(mapped)
    messages.read_next_message()  # the schema
    while batches:
        batches -= messages.read_next_message().type == "record batch"
    if mapped.tell() + END_MARK_BYTES < mapped.size() - TRAILER_BYTES - footer_length:
        raise _RowProblemError(None, "has more than its footer lists; several Arrow files must be in a file each")


def _rows(batch: Any, before: int) -> Iterator[dict[str, Any]]:
    """Convert the rows, many at a time unless they are large, so that one that cannot be is found."""
    count = batch.num_rows
    if count > 1 and (batch.nbytes > SLICE_BYTES or _values(batch.columns) > SLICE_VALUES):
        yield from _halves(batch, before)
        return
    if _values(batch.columns) > MOST_ROW_VALUES:
        raise _RowProblemError(before + 1, too_large())
    try:
        columns = {name: _plain(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except Exception as error:  # noqa: BLE001
        if count > 1:
            yield from _halves(batch, before)
            return
        raise _RowProblemError(before + 1, _problem(error)) from None
    for cells in zip(*columns.values(), strict=True):
        yield dict(zip(columns, cells, strict=True))


def _halves(batch: Any, before: int) -> Iterator[dict[str, Any]]:
    half = batch.num_rows // 2
    yield from _rows(batch.slice(0, half), before)
    yield from _rows(batch.slice(half), before + half)


def _values(columns: Sequence[Any]) -> int:
    """Count the elements of all lists, which may take no bytes in the file."""
    count = 0
    for column in columns:
        if pa.types.is_struct(column.type):
            count += _values(column.flatten())
        elif pa.types.is_nested(column.type):
            inner = _entries(column) if pa.types.is_map(column.type) else column.flatten()
            count += len(inner) + _values([inner])
    return count


def _entries(column: Any) -> Any:
    """Values of a column of maps."""
    first, last = column.offsets[0].as_py(), column.offsets[-1].as_py()
    return column.items.slice(first, last - first)


def _plain(column: Any) -> list[Any]:
    values: list[Any] = column.to_pylist(maps_as_pydicts="strict")
    return values if not _may_hold_structs(column.type) else [_without_padding(value, column.type) for value in values]


def _without_padding(value: Any, kind: Any) -> Any:
    """Leave out the nulls of structs: Arrow gives each row all keys that any row has. Others are the user's."""
    if value is None:
        return None
    if _is_json(kind):
        return json.loads(value)
    if pa.types.is_struct(kind):
        kinds = {field.name: field.type for field in kind}
        return {key: _without_padding(inner, kinds[key]) for key, inner in value.items() if inner is not None}
    if pa.types.is_map(kind):
        return {key: _without_padding(inner, kind.item_type) for key, inner in value.items()}
    if isinstance(kind, (pa.DictionaryType, pa.RunEndEncodedType)):
        return _without_padding(value, kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _without_padding(value, kind.storage_type)
    if isinstance(value, list):  # of any kind, views included
        return [_without_padding(inner, kind.value_type) for inner in value]
    return value


def _may_hold_structs(kind: Any) -> bool:
    encoded = (pa.DictionaryType, pa.RunEndEncodedType, pa.BaseExtensionType)
    return pa.types.is_nested(kind) or isinstance(kind, encoded)


def _is_json(kind: Any) -> bool:
    return isinstance(kind, pa.JsonType)


def _problem(error: BaseException) -> str:
    """Say what is wrong without quoting a row."""
    if isinstance(error, MemoryError):
        return (
            f"needs more than {READER_MEMORY_BYTES >> 20} MiB of memory to read; write it with smaller row groups,"
            " pages and rows"
        )
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, UnicodeEncodeError):
        return SURROGATE_PROBLEM
    if isinstance(error, UnicodeDecodeError):
        return "has text that is no UTF-8"
    if isinstance(error, RecursionError):
        return "is nested too deep"
    known = next((words for words in KNOWN_PROBLEMS if words in str(error)), None)
    return f"is damaged or no such file ({known or type(error).__name__})"


if __name__ == "__main__":
    sys.exit(main())
