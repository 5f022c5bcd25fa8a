"""The rows of a source, one batch at a time: memory does not grow with their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_trainer.data.rows.arrow_rows import read_arrow
from qlora_trainer.data.rows.csv_rows import read_csv
from qlora_trainer.data.rows.errors import MissingColumnError, RowsError, unexpected_problem
from qlora_trainer.data.rows.json_rows import read_json
from qlora_trainer.data.rows.limits import BATCH_BYTES, BATCH_ROWS
from qlora_trainer.data.rows.place import RowPlace
from qlora_trainer.errors import UserError
from qlora_trainer.row_files import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qlora_trainer.data.rows.json_rows import JsonRow
    from qlora_trainer.data.rows.source import SourceFile, SourceFiles

Row = dict[str, Any]
_EMPTY: tuple[Any, ...] = (None, "", [], {})
MOST_NAMES = 1000
"""Maximum number of column names that are remembered; each object of JSON may have its own."""


@dataclass(frozen=True)
class Batch:
    """Some rows, one after another."""

    rows: list[Row]
    """Cells of the wanted columns; one that is not there is None."""
    places: list[RowPlace]
    done: int
    """Bytes of the source that were read so far."""
    unread: frozenset[str] = frozenset()
    """Columns of the rows so far that are not wanted."""
    filled: tuple[frozenset[str], ...] = ()
    """For each row, the watched columns that hold something; of binary files, whose other columns stay on the disk,
    those there are."""


@dataclass(frozen=True)
class Rows:
    """The rows of a source, with the wanted columns alone. Read anew by each call."""

    source: SourceFiles
    needed: Mapping[str, str]
    """Column → the manifest's field that names it, such as ``spec.dataset.columns.prompt``."""
    optional: Sequence[str] = ()
    """Columns that are read if they are there."""
    watched: frozenset[str] = frozenset()
    """Columns of which each row tells, where they are not read, whether they hold something."""

    def count(self) -> int:
        """Read all rows to know how many there are."""
        return sum(len(batch.rows) for batch in self.batches())

    def batches(self, most_rows: int = BATCH_ROWS, most_bytes: int = BATCH_BYTES) -> Iterator[Batch]:
        """Read all rows in order.

        Raises:
            UserError: missing column, no rows, damaged files, or rows beyond the limits.

        """
        source = self.source
        try:
            yield from self._batches(most_rows, most_bytes)
        except MissingColumnError as error:
            known = f"its columns are {error.known}{error.hint}"
            one = len(source.files) == 1 or source.kind is Kind.SAVED
            where = source.path if one else f"{error.file} in {source.path}"
            raise UserError(self.needed[error.column], error.column, f"is not a column of {where}; {known}") from None
        except RowsError as error:
            raise UserError(source.field, source.path, f"cannot be read as {source.kind}: {error}") from error
        except OSError as error:
            raise UserError(
                source.field, source.path, f"cannot be read as {source.kind}: {error.strerror or type(error).__name__}"
            ) from error
        except UserError:
            raise
        except MemoryError:
            raise UserError(
                source.field, source.path, f"cannot be read as {source.kind}: a row needs more memory than there is"
            ) from None
        except Exception as error:  # noqa: BLE001
            problem = unexpected_problem(error)
            raise UserError(source.field, source.path, f"cannot be read as {source.kind}: {problem}") from None

    def _batches(self, most_rows: int, most_bytes: int) -> Iterator[Batch]:
        wanted = (*self.needed, *self.optional)
        watched = self.watched.difference(wanted)
        rows: list[Row] = []
        places: list[RowPlace] = []
        names: set[str] = set()
        filled: list[frozenset[str]] = []
        size = number = done = 0
        for file, (where, cells, row_bytes, file_done), before in self._located(names):
            number += 1
            rows.append({name: cells.get(name) for name in wanted})
            places.append(RowPlace(number, file.name, where))
            there = watched & (cells.keys() if self._is_text else names)
            filled.append(frozenset(name for name in there if cells.get(name, ...) not in _EMPTY))
            size += row_bytes
            done = before + file_done
            if len(rows) == most_rows or size >= most_bytes:
                yield Batch(rows, places, done, frozenset(names.difference(wanted)), tuple(filled))
                rows, places, filled, size = [], [], [], 0
        if rows:
            yield Batch(rows, places, done, frozenset(names.difference(wanted)), tuple(filled))
        if not number:
            raise UserError(self.source.field, self.source.path, "has no rows; at least one is needed")

    def _located(self, names: set[str]) -> Iterator[tuple[SourceFile, JsonRow, int]]:
        """(file, row, bytes of the files before); the names of columns are put into ``names``."""
        last: SourceFile | None = None
        before = 0
        for file, row in self._read(names):
            if file is not last:
                before += last.size if last else 0
                last = file
            yield file, row, before

    def _read(self, names: set[str]) -> Iterator[tuple[SourceFile, JsonRow]]:
        def require(file: SourceFile, found: list[str]) -> None:
            self._require(file, found)
            names.update(found)

        if not self._is_text:
            yield from read_arrow(self.source.files, list(dict.fromkeys([*self.needed, *self.optional])), require)
            return
        read = read_json if self.source.kind is Kind.JSON else read_csv
        for file in self.source.files:
            for number, row in enumerate(read(file)):
                if number == 0:
                    self._require(file, row[1])
                if len(names) < MOST_NAMES:
                    names.update(row[1])
                yield file, row

    @property
    def _is_text(self) -> bool:
        return self.source.kind in (Kind.JSON, Kind.CSV)

    def _require(self, file: SourceFile, names: Mapping[str, Any] | list[str]) -> None:
        missing = next((column for column in self.needed if column not in names), None)
        if missing is not None:
            raise MissingColumnError(missing, names, file.name, self._hint(names))

    def _hint(self, names: Mapping[str, Any] | list[str]) -> str:
        if "conversations" in names and "messages" in self.needed:
            return ". Set spec.dataset.columns.messages to conversations"
        if isinstance(names, dict) and (
            inner := next((n for n, v in names.items() if _is_table(v, self.needed)), None)
        ):
            return f'. "{inner}" is a list of such rows: write each on a line of its own (JSON Lines)'
        return ""


def _is_table(value: Any, needed: Mapping[str, str]) -> bool:
    """Return True for a list of rows."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and set(needed) <= set(value[0])
