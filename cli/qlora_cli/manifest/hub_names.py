"""Find sources that are written as the Hub's pages write them: ``org/name`` for ``hf://org/name``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_api.errors import FieldError
from qlora_cli.manifest.local_paths import is_here

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = ("spec.model.source", "spec.dataset.train.source", "spec.dataset.eval.source")
_HUB_NAME = re.compile(r"(?P<org>[A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_FILE_OF_ROWS = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|gz|zst|bz2)$", re.IGNORECASE)


def bare_hub_names(manifest: dict[str, Any], job: str = "") -> Iterator[FieldError]:
    """Yield an error for each source that reads ``org/name`` and is no path here; ``job``: path of the job's spec."""
    for source in SOURCES:
        field = f"{job}{source}"
        value: Any = manifest
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str) and _is_bare_hub_name(value):
            yield FieldError(field, value, f"is no path here; from the Hub it is hf://{value}, a path begins with ./")


def _is_bare_hub_name(source: str) -> bool:
    """Return whether it can only be a repository of the Hub; where its first folder exists, it is a wrong path."""
    found = _HUB_NAME.fullmatch(source)
    return found is not None and not _FILE_OF_ROWS.search(source) and not is_here(Path(found["org"]))
