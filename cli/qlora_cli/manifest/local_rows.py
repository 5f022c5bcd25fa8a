"""Compare what a manifest says of its rows with the rows on this machine."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import zlib
from typing import IO, TYPE_CHECKING

from qlora_api.errors import FieldError, ManifestError, closest, validate
from qlora_api.spec import REQUIRED_COLUMNS, DatasetSpec
from qlora_cli.manifest import crd_schema
from qlora_cli.manifest.local_paths import local_file, local_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".bz2")
"""Both as ``qlora_trainer.row_files`` has them; a test compares them."""
ALLOWED = (
    f"must be a file that ends in {', '.join(SUFFIXES)} (JSON and CSV also followed by {', '.join(COMPRESSIONS)}), in"
    " capitals or not, a folder of such files, or a folder written by datasets.save_to_disk"
)
SPLITS = {"train": "spec.dataset.train.source", "eval": "spec.dataset.eval.source"}
MOST_BYTES = 1 << 20
"""Largest first row that is read here; Prepare reads the rest."""
MOST_FILES = 100
"""Most files of a folder that are looked at here; Prepare looks at all."""


def row_errors(manifest: object) -> Iterator[FieldError]:
    """Yield an error for each local file of another kind and each column that is not there, in the words of Prepare.

    A dataset with errors of its own, and a file that cannot be read, are left to others; so is a column that not all
    files of a folder have.
    """
    spec = manifest.get("spec") if isinstance(manifest, dict) else None
    group = spec.get("dataset") if isinstance(spec, dict) else None
    schema = crd_schema.fields_of(crd_schema.root()["properties"]["spec"])["dataset"]
    try:
        dataset = validate(DatasetSpec, crd_schema.without_nulls(group, schema))
    except ManifestError:
        return
    sources = {"train": dataset.train.source, "eval": dataset.eval.source if dataset.eval else None}
    checked: set[str] = set()
    for split, source in sources.items():
        if source is None or source in checked:
            continue
        checked.add(source)
        path = local_file(source)
        if path and not _plain_name(path).endswith(SUFFIXES):
            yield FieldError(SPLITS[split], source, ALLOWED)
            continue
        columns = columns_of(source)
        for column, field in dataset.required_columns.items() if columns else ():
            if column not in columns:
                close = closest(column, columns)
                hint = f"; did you mean {close[0]}?" if close else ""
                yield FieldError(
                    field, column, f"is not a column of {source}; its columns are {', '.join(columns)}{hint}"
                )


def columns_of(source: str) -> list[str]:
    """Return the columns of a local file, or of all files of a local folder; empty where not all can be read here."""
    if path := local_file(source):
        return _columns_of_file(path)
    folder = local_folder(source)
    found = [_columns_of_file(path) for path in _row_files(folder)] if folder else []
    return list(dict.fromkeys(column for columns in found for column in columns)) if all(found) else []


def recognized_format(source: str) -> str | None:
    """Return the format that the columns of local rows are those of; None where that cannot be told."""
    columns = columns_of(source)
    return next((form.value for form, needed in REQUIRED_COLUMNS.items() if columns and {*needed} <= {*columns}), None)


def _row_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may have rows; none where they are too many to look into."""
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    except OSError:
        return []
    rows = [path for path in files if _plain_name(path).endswith(SUFFIXES)]
    return rows if len(rows) <= MOST_FILES else []


def _columns_of_file(path: Path) -> list[str]:
    """Return the columns of the first row; empty where there is none that can be read here."""
    name = _plain_name(path)
    try:
        with _open(path) as file:
            line = file.readline(MOST_BYTES)
        if name.endswith((".csv", ".tsv")):
            delimiter = "\t" if name.endswith(".tsv") else ","
            return next(csv.reader([line.decode("utf-8-sig")], delimiter=delimiter), [])
        row = json.loads(line) if name.endswith((".jsonl", ".ndjson")) else None
    except (OSError, EOFError, zlib.error, ValueError, RecursionError, csv.Error):
        return []
    return list(row) if isinstance(row, dict) else []


def _plain_name(path: Path) -> str:
    """Return the name in small letters, without the suffix of a compression."""
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSIONS if name.endswith(suffix)), name)


def _open(path: Path) -> IO[bytes] | gzip.GzipFile | bz2.BZ2File:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
    return path.open("rb")
