"""Rows from files: JSON Lines, Parquet, CSV, folders of them, and folders written by ``datasets.save_to_disk``.

The files are read directly, not by ``datasets.load_dataset``, which would copy every row into a cache in the home
folder and guess types from the first rows. Nothing is written here.
"""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

Row = dict[str, Any]

CSV_BLOCK_BYTES = 64 << 20
"""A CSV row must fit one block of pyarrow's reader; its default of 1 MiB is shorter than long documents."""


class Kind(StrEnum):
    JSON = "JSON Lines"
    PARQUET = "Parquet"
    CSV = "CSV"
    SAVED = "datasets.save_to_disk"


KINDS = {
    ".jsonl": Kind.JSON,
    ".json": Kind.JSON,
    ".jsonl.gz": Kind.JSON,
    ".json.gz": Kind.JSON,
    ".parquet": Kind.PARQUET,
    ".csv": Kind.CSV,
    ".csv.gz": Kind.CSV,
}
_ALLOWED = (
    f"must be a file that ends in {', '.join(KINDS)}, a folder of such files, or a folder written by"
    " datasets.save_to_disk"
)


@dataclass(frozen=True)
class SourceFiles:
    """Files that a path of the manifest stands for. ``files`` is all that is read, in the order of the rows."""

    field: str
    """Of the manifest; errors in the files are reported there."""
    kind: Kind
    folder: Path
    """The folder of ``files``; for ``SAVED`` the one to load."""
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Rows:
    """Rows with the wanted columns only, read in slices."""

    count: int
    read: Callable[[int, int], list[Row]]
    """Rows ``[start, stop)``. A cell that is not there is None."""

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[tuple[int, list[Row]]]:
        """All rows in order, as (number of the first row from 0, at most ``size`` rows)."""
        for start in range(0, self.count, size):
            yield start, self.read(start, min(start + size, self.count))


def find_source(path: Path, field: str) -> SourceFiles:
    """Find the files behind ``path``.

    Args:
        path: a local file or folder.
        field: what an error is reported at, such as ``spec.dataset.train.source``.

    Raises:
        UserError: nothing is there, or nothing that can be read.

    """
    if path.is_dir():
        return _find_in_folder(path, field)
    if not path.exists():
        raise UserError(field, path, f"is not there; {_ALLOWED}")
    kind = _kind(path)
    if kind is None:
        raise UserError(field, path, f"is of no known type; {_ALLOWED}")
    return SourceFiles(field, kind, path.parent, (path,))


def load_rows(path: Path, field: str, needed: Mapping[str, str], optional: Sequence[str] = ()) -> Rows:
    """Open the rows at ``path``.

    Args:
        path: a local file or folder.
        field: where the path stands in the manifest; errors in the files are reported there.
        needed: column → the manifest's field that names it, such as ``spec.dataset.columns.prompt``.
        optional: columns that are read if they are there.

    Raises:
        UserError: missing path or column, no rows, unknown or unreadable files.

    """
    source = find_source(path, field)
    try:
        rows = _READERS[source.kind](source, needed, optional)
    except _MissingColumnError as error:
        column, names = error.args
        known = ", ".join(sorted(names)) or "none"
        raise UserError(needed[column], column, f"is not a column of {path}; its columns are {known}") from None
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:  # pyarrow's errors are ValueErrors
        raise UserError(field, path, f"cannot be read as {source.kind}: {_one_line(error)}") from error
    if not len(rows):
        raise UserError(field, path, "has no rows; at least one is needed")
    return rows


class _MissingColumnError(Exception):
    """(column, columns that are there)."""


def _kind(path: Path) -> Kind | None:
    name = path.name.lower()
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)


def _find_in_folder(folder: Path, field: str) -> SourceFiles:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
        if "train" not in splits:
            raise UserError(field, folder, f'has no split "train"; point at one of its folders: {", ".join(splits)}')
        return _find_in_folder(folder / "train", field)
    if (folder / "state.json").exists():
        return SourceFiles(field, Kind.SAVED, folder, _saved_files(folder, field))
    # Hubs and Spark leave notes and markers beside the rows (.gitattributes, README.md, _SUCCESS).
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] not in "._" and p.suffix != ".md")
    if not files:
        inside = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))
        hint = f" itself (its folders are {inside})" if inside else ""
        raise UserError(field, folder, f"has no files in it{hint}; {_ALLOWED}")
    kinds = {_kind(p) for p in files}
    kind = kinds.pop()
    if kind is None or kinds:
        names = ", ".join(p.name for p in files[:5]) + (" …" if len(files) > 5 else "")
        raise UserError(field, folder, f"must hold files of one known type; it holds {names}. The source {_ALLOWED}")
    return SourceFiles(field, kind, folder, tuple(files))


def _saved_files(folder: Path, field: str) -> tuple[Path, ...]:
    """Those of the dataset itself: maps and filters leave their caches in the same folder."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = tuple(folder / file["filename"] for file in state["_data_files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(field, folder, f"cannot be read as {Kind.SAVED}: state.json: {_one_line(error)}") from error
    for number, (file, entry) in enumerate(zip(files, state["_data_files"], strict=True)):
        if file.parent != folder or file.name != entry["filename"] or file.name == "..":
            raise UserError(
                field, folder, f"has a state.json whose _data_files[{number}] is not the name of a file beside it"
            )
    return files


# ------------------------------------------------------------------------------------------------------------- readers


def _read_json(source: SourceFiles, needed: Mapping[str, str], optional: Sequence[str]) -> Rows:
    """By the standard library, since pyarrow's reader wants one type per column and tool calls have many."""
    wanted = (*needed, *optional)
    names: set[str] = set()
    rows: list[Row] = []
    for path in source.files:
        for row in _json_objects(path):
            names.update(row)
            rows.append({name: row.get(name) for name in wanted})
    if rows:
        _require(needed, names)
    return Rows(len(rows), lambda start, stop: rows[start:stop])


def _json_objects(path: Path) -> Iterator[Row]:
    """One object a line; a file that is one array of objects is taken as well."""
    with _open(path) as file:
        number = 0
        for line in file:
            number += 1
            if line.isspace():
                continue
            if number == 1 and line.lstrip().startswith(b"["):
                yield from _checked(json.loads(line + file.read()), path)
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
            yield _object(row, f"{path.name}, line {number}")


def _checked(array: list[Any], path: Path) -> Iterator[Row]:
    return (_object(row, f"{path.name}, element {number}") for number, row in enumerate(array, start=1))


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise TypeError(f'{where}: must be an object such as {{"text": "…"}}, not {type(value).__name__}')
    return value


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_parquet(source: SourceFiles, needed: Mapping[str, str], optional: Sequence[str]) -> Rows:
    files = [pa_parquet.ParquetFile(path) for path in source.files]
    names = {name for file in files for name in file.schema_arrow.names}
    _require(needed, names)
    wanted = [name for name in (*needed, *optional) if name in names]
    tables = [file.read([name for name in wanted if name in file.schema_arrow.names]) for file in files]
    return _rows_of(pa.concat_tables(tables, promote_options="permissive"), needed, optional)


def _read_csv(source: SourceFiles, needed: Mapping[str, str], optional: Sequence[str]) -> Rows:
    """Every cell is text: "007" stays "007", and an empty cell is an empty text."""
    read = pa_csv.ReadOptions(block_size=CSV_BLOCK_BYTES)
    parse = pa_csv.ParseOptions(newlines_in_values=True)
    tables = []
    for path in source.files:
        with pa_csv.open_csv(path, read_options=read, parse_options=parse) as head:
            names = head.schema.names
        _require(needed, names)
        wanted = [name for name in (*needed, *optional) if name in names]
        convert = pa_csv.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
        )
        tables.append(pa_csv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert))
    return _rows_of(pa.concat_tables(tables, promote_options="permissive"), needed, optional)


def _read_saved(source: SourceFiles, needed: Mapping[str, str], optional: Sequence[str]) -> Rows:
    import datasets  # noqa: PLC0415 seconds to import, and seldom needed

    if not source.files:  # datasets writes no file for no rows, and then cannot load it
        return Rows(0, lambda _start, _stop: [])
    saved = datasets.load_from_disk(str(source.folder)).with_format(None)
    _require(needed, saved.column_names)
    wanted = [name for name in (*needed, *optional) if name in saved.column_names]
    chosen = saved.select_columns(wanted)
    absent = dict.fromkeys(set(optional) - set(wanted))

    def read(start: int, stop: int) -> list[Row]:
        columns = chosen[start:stop]
        return [dict(zip(columns, cells, strict=True)) | absent for cells in zip(*columns.values(), strict=True)]

    return Rows(len(chosen), read)


_READERS: dict[Kind, Callable[[SourceFiles, Mapping[str, str], Sequence[str]], Rows]] = {
    Kind.JSON: _read_json,
    Kind.PARQUET: _read_parquet,
    Kind.CSV: _read_csv,
    Kind.SAVED: _read_saved,
}


def _rows_of(table: Any, needed: Mapping[str, str], optional: Sequence[str]) -> Rows:
    absent = dict.fromkeys(name for name in (*needed, *optional) if name not in table.column_names)

    def read(start: int, stop: int) -> list[Row]:
        return [row | absent for row in table.slice(start, stop - start).to_pylist()]

    return Rows(table.num_rows, read)


def _require(needed: Mapping[str, str], names: Sequence[str] | set[str]) -> None:
    missing = next((column for column in needed if column not in names), None)
    if missing is not None:
        raise _MissingColumnError(missing, list(names))


def _one_line(error: Exception) -> str:
    """Give the error's text without the rows: pyarrow ends its sentence on a CSV row of wrong length with the row."""
    text = " ".join(str(error).split())
    counts = re.match(r"CSV parse error: (Row #\d+: )?Expected \d+ columns, got \d+", text)
    return (counts.group() if counts else text) or type(error).__name__
