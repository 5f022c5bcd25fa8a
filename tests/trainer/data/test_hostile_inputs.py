"""Bases and rows from someone who wants other files read, or rows shown to those who may only view a job."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from qlora_trainer.data.rows.read import Rows
from qlora_trainer.data.rows.source import find_source
from qlora_trainer.errors import UserError
from qlora_trainer.storage.model_files import ModelFilesError, check_code, safetensors_header

if TYPE_CHECKING:
    from pathlib import Path

FIELD = "spec.dataset.train.source"


@pytest.mark.parametrize("other", ["other.safetensors", "adapter_model.bin", "../x/model.safetensors", ""])
def test_a_base_cannot_name_other_weights(other: str) -> None:
    with pytest.raises(ModelFilesError, match="transformers_weights"):
        check_code("config.json", json.dumps({"transformers_weights": other}).encode())


def test_a_bad_csv_row_is_counted_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nfine,1\nsecret of a patient,2,3\n")
    with pytest.raises(UserError, match="Expected 2 columns, got 3") as caught:
        list(Rows(find_source(tmp_path / "rows.csv", FIELD), {"text": "spec.dataset.columns.text"}).batches())
    assert "patient" not in str(caught.value)


DEEP = "[" * 200_000


@pytest.mark.parametrize("text", ['{"text": ' + DEEP, DEEP], ids=["line", "array"])
def test_rows_nested_too_deep_are_the_users_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match="cannot be read as JSON Lines"):
        list(Rows(find_source(tmp_path / "rows.jsonl", FIELD), {"text": "spec.dataset.columns.text"}).batches())


def test_a_saved_dataset_nested_too_deep_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(DEEP)
    with pytest.raises(UserError, match="cannot be read"):
        find_source(tmp_path, FIELD)


def test_a_base_nested_too_deep_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="not JSON"):
        check_code("config.json", DEEP.encode())
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    with pytest.raises(ModelFilesError, match="cannot be read"):
        safetensors_header(path)
