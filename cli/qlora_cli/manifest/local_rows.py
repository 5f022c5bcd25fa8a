"""Compare the columns that a manifest names with those of a JSON Lines file on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_api.errors import FieldError, ManifestError, closest, validate
from qlora_api.spec import DatasetSpec
from qlora_cli.manifest import crd_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

SUFFIXES = (".jsonl", ".ndjson")
MOST_BYTES = 1 << 20
"""Of the first row; Prepare reads the rest."""


def column_errors(manifest: object) -> Iterator[FieldError]:
    """Yield an error for each column that the first row of a local file does not have, in the words of Prepare.

    A dataset with errors of its own, and a file that cannot be read or holds something else, are left to others.
    """
    spec = manifest.get("spec") if isinstance(manifest, dict) else None
    group = spec.get("dataset") if isinstance(spec, dict) else None
    schema = crd_schema.fields_of(crd_schema.root()["properties"]["spec"])["dataset"]
    try:
        dataset = validate(DatasetSpec, crd_schema.without_nulls(group, schema))
    except ManifestError:
        return
    for source in dict.fromkeys((dataset.train.source, dataset.eval.source if dataset.eval else None)):
        row = _first_row(source) if source else None
        if row is None:
            continue
        for column, field in dataset.required_columns.items():
            if column not in row:
                close = closest(column, row)
                hint = f"; did you mean {close[0]}?" if close else ""
                yield FieldError(field, column, f"is not a column of {source}; its columns are {', '.join(row)}{hint}")


def _first_row(source: str) -> dict[str, Any] | None:
    """Return the first row of a file of JSON Lines; None where there is none to read."""
    place = source.removeprefix("file://")
    path = Path(place).expanduser()
    if "://" in place or path.suffix.lower() not in SUFFIXES or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            row = json.loads(file.readline(MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
