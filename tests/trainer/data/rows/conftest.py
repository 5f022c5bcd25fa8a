"""Read sources as Prepare does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qlora_trainer.data.rows.read import Row, Rows
from qlora_trainer.data.rows.source import find_source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from qlora_trainer.data.rows.place import RowPlace

FIELD = "spec.dataset.train.source"
NEEDED = {"prompt": "spec.dataset.columns.prompt", "completion": "spec.dataset.columns.completion"}


@pytest.fixture(scope="session")
def open_rows() -> Callable[..., Rows]:
    def open_source(path: Path, needed: Mapping[str, str] = NEEDED, optional: Sequence[str] = ()) -> Rows:
        return Rows(find_source(path, FIELD), needed, optional)

    return open_source


@pytest.fixture(scope="session")
def read_rows(open_rows: Callable[..., Rows]) -> Callable[..., list[Row]]:
    def read(*arguments: object) -> list[Row]:
        return [row for batch in open_rows(*arguments).batches() for row in batch.rows]

    return read


@pytest.fixture(scope="session")
def places(open_rows: Callable[..., Rows]) -> Callable[..., list[RowPlace]]:
    def read(*arguments: object) -> list[RowPlace]:
        return [place for batch in open_rows(*arguments).batches() for place in batch.places]

    return read
