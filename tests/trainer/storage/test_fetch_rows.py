"""Rows arrive as a file or as a folder with all its files, from wherever they are."""

import pytest

from qlora_storage.object_store import open_store
from qlora_trainer.errors import UserError
from qlora_trainer.storage.fetch import fetch_rows
from storage_fixtures import names, upload

ROWS = "spec.dataset.train.source"


@pytest.mark.parametrize("source", ["{s3}/rows/train.jsonl", "{s3}/rows", "{here}/train.jsonl", "{here}"])
def test_rows_come_as_a_file_or_as_a_folder(tmp_path, s3, source):
    here = tmp_path / "rows"
    here.mkdir()
    (here / "train.jsonl").write_text('{"text": "a"}\n')
    upload(here, f"{s3}/rows")
    found = fetch_rows(source.format(s3=s3, here=here), ROWS, tmp_path / "cache")
    assert found.is_file() == source.endswith(".jsonl")
    assert (found if found.is_file() else found / "train.jsonl").read_text() == '{"text": "a"}\n'


def test_a_folder_written_by_save_to_disk_comes_whole(tmp_path, s3):
    store = open_store(f"{s3}/rows", "x")
    for name in ("dataset_info.json", "state.json", "data-00000-of-00001.arrow", "notes.md"):
        store.put(name, b"{}")
    found = fetch_rows(f"{s3}/rows", ROWS, tmp_path / "cache")
    assert names(found) == ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"]


@pytest.mark.parametrize("source", ["{s3}/none.jsonl", "{s3}/none", "{s3}", "{here}/none.jsonl"])
def test_rows_that_are_not_there_are_named_with_their_field(tmp_path, s3, source):
    source = source.format(s3=s3, here=tmp_path)
    with pytest.raises(UserError, match=r"holds no rows|does not exist") as caught:
        fetch_rows(source, "spec.dataset.eval.source", tmp_path / "cache")
    assert str(caught.value).startswith(f'spec.dataset.eval.source: "{source}"')


@pytest.mark.parametrize(
    ("source", "found"),
    [
        pytest.param("hf://org/rows", ["data/train.parquet"], id="repository-of-splits"),
        pytest.param("hf://org/rows@main/data", ["train.parquet"], id="folder-inside"),
        pytest.param("hf://datasets/org/rows@v1/data/train.parquet", "train.parquet", id="file-inside"),
    ],
)
def test_rows_on_the_hub_are_a_repository_a_folder_or_a_file(tmp_path, hub, source, found):
    files = ("data/train.parquet", "data/test.parquet", "README.md", "load.py", "dataset_infos.json")
    hub.add("org/rows", dict.fromkeys(files, b"rows"), kind="datasets")
    path = fetch_rows(source, ROWS, tmp_path / "cache")
    assert (path.name if path.is_file() else names(path)) == found


def test_a_repository_without_rows_is_told(tmp_path, hub):
    hub.add("org/rows", {"README.md": b"x"}, kind="datasets")
    with pytest.raises(UserError, match="has no files in it; it must be a file that ends in"):
        fetch_rows("hf://org/rows", ROWS, tmp_path)


def test_an_evaluation_source_brings_its_own_split_from_the_hub(tmp_path, hub):
    hub.add("org/rows", dict.fromkeys(("data/train.parquet", "data/test.parquet"), b"rows"), kind="datasets")
    assert names(fetch_rows("hf://org/rows", "spec.dataset.eval.source", tmp_path)) == ["data/test.parquet"]
    assert names(fetch_rows("hf://org/rows", ROWS, tmp_path)) == ["data/train.parquet"]


def test_all_files_of_a_bucket_are_brought_and_none_is_passed_over(tmp_path, s3):
    store = open_store(f"{s3}/rows", "x")
    for name in ("a.jsonl", "C.JSONL", "b.jsonl.zst", "sub/d.ndjson", "README.md", "_SUCCESS"):
        store.put(name, b"{}")
    found = fetch_rows(f"{s3}/rows", ROWS, tmp_path / "cache")
    assert names(found) == ["C.JSONL", "a.jsonl", "b.jsonl.zst", "sub/d.ndjson"]
    store.put("e.xlsx", b"{}")
    with pytest.raises(UserError, match=r"has files that cannot be read as rows: e\.xlsx"):
        fetch_rows(f"{s3}/rows", ROWS, tmp_path / "cache")
