"""Sources from someone who wants other files read: links, pipes, devices, files of the kernel, files that change."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import datasets
import pytest

from qlora_storage import object_store
from qlora_trainer.data.rows import source as source_module
from qlora_trainer.data.rows.source import contents, find_source
from qlora_trainer.errors import UserError

FIELD = "spec.dataset.train.source"
EVAL_FIELD = "spec.dataset.eval.source"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "rows").mkdir()
    (tmp_path / "secret.jsonl").write_text('{"prompt": "s", "completion": "s"}\n')
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "s.jsonl").write_text('{"prompt": "s", "completion": "s"}\n')
    (tmp_path / "rows" / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path / "rows"


def refused(path: Path, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        find_source(path, FIELD)
    assert str(caught.value).startswith(f'{FIELD}: "{path}" ')


@pytest.mark.parametrize("target", ["../secret.jsonl", "{outside}/secret.jsonl", "../secrets", "/proc/self/environ"])
def test_a_link_that_leads_out_of_the_source_is_refused(folder, target):
    (folder / "b.jsonl").symlink_to(target.format(outside=folder.parent))
    refused(folder, r"has a link that leads out of it: b.jsonl\. Put the file itself there")


def test_a_link_behind_a_link_is_looked_through(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "out").symlink_to(folder.parent)
    refused(folder, "leads out of it: sub/out")


def test_a_link_inside_the_source_is_followed_and_a_file_is_read_once(folder):
    (folder / "b.jsonl").symlink_to("a.jsonl")
    (folder / "sub").mkdir()
    (folder / "sub" / "c.jsonl").write_text("{}\n")
    (folder / "twice").symlink_to("sub")
    (folder / "sub" / "round").symlink_to("..")
    assert [file.name for file in find_source(folder, FIELD).files] == ["a.jsonl", "sub/c.jsonl"]


def test_a_mounted_config_map_is_read(folder):
    (folder / "..2026").mkdir()
    shutil.move(folder / "a.jsonl", folder / "..2026" / "a.jsonl")
    (folder / "..data").symlink_to("..2026")
    (folder / "a.jsonl").symlink_to("..data/a.jsonl")
    assert [file.name for file in find_source(folder, FIELD).files] == ["a.jsonl"]


def test_a_snapshot_of_the_hugging_face_cache_is_read(folder, read_rows):
    repository = folder.parent / "hub" / "datasets--org--rows"
    snapshot = repository / "snapshots" / "c0ffee"
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "data").mkdir(parents=True)
    shutil.move(folder / "a.jsonl", repository / "blobs" / "0123")
    (snapshot / "data" / "train.jsonl").symlink_to("../../../blobs/0123")
    for path in (snapshot, snapshot / "data", snapshot / "data" / "train.jsonl"):
        assert read_rows(path) == [{"prompt": "a", "completion": "b"}]
    (snapshot / "data" / "more.jsonl").symlink_to("../../../../../secret.jsonl")
    refused(snapshot, "leads out of it: data/more.jsonl")


def test_a_link_to_nothing_and_a_circle_are_named(folder):
    (folder / "b.jsonl").symlink_to("nowhere")
    refused(folder, "is not there|cannot be read")
    (folder / "b.jsonl").unlink()
    (folder / "b.jsonl").symlink_to("b.jsonl")
    refused(folder, "cannot be read")


def test_a_claim_does_not_lead_elsewhere(folder, monkeypatch):
    claims = folder.parent / "claims"
    monkeypatch.setattr(object_store, "PVC_MOUNT", claims)
    (claims / "mine" / "new").mkdir(parents=True)
    (claims / "mine" / "new" / "a.jsonl").write_text("{}\n")
    (claims / "mine" / "latest").symlink_to("new")
    (claims / "mine" / "out").symlink_to(folder.parent / "secrets")
    (claims / "mine" / "out.jsonl").symlink_to(folder.parent / "secret.jsonl")
    assert len(find_source(claims / "mine" / "latest", FIELD).files) == 1
    refused(claims / "mine" / "out", "leads out of its claim by a link")
    refused(claims / "mine" / "out.jsonl", "leads out of its claim by a link")


def test_what_is_no_regular_file_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "b.jsonl")
    refused(folder, r"b.jsonl is a pipe; only regular files are read")
    refused(folder / "b.jsonl", r"b.jsonl is a pipe")
    (folder / "b.jsonl").unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "b.jsonl"))
        refused(folder, "b.jsonl is a socket")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device files")
def test_a_device_is_refused(folder):
    os.mknod(folder / "b.jsonl", 0o20666, os.makedev(1, 5))
    refused(folder, "b.jsonl is a device")


def test_files_of_the_kernel_are_refused(folder):
    (folder.parent / "environ.json").symlink_to("/proc/self/environ")
    refused(folder.parent / "environ.json", "is made up by the kernel")


@pytest.mark.parametrize("name", ["../other/x.arrow", "/etc/x.arrow", "a/x.arrow", "./x.arrow", "..", "", "none", 7])
def test_a_saved_dataset_cannot_name_files_elsewhere(folder, name):
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    refused(folder, "_data_files.0. is not the name of a file beside it")


def test_a_saved_dataset_cannot_link_elsewhere(folder):
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]).save_to_disk(str(folder / "saved"))
    shard = next((folder / "saved").glob("*.arrow"))
    shard.rename(folder.parent / "elsewhere.arrow")
    shard.symlink_to(folder.parent / "elsewhere.arrow")
    refused(folder / "saved", "leads out of it: data-00000-of-00001.arrow")


def test_a_selection_of_a_saved_dataset_is_named(folder):
    state = {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    refused(folder, "flatten_indices")


def test_all_files_that_are_read_are_in_the_identity(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "b.jsonl").write_text("{}\n")
    before = contents(find_source(folder, FIELD))
    (folder / "README.md").write_text("not read")
    assert contents(find_source(folder, FIELD)) == before
    (folder / "sub" / "b.jsonl").write_text("{ }\n")
    assert contents(find_source(folder, FIELD)) != before


@pytest.mark.parametrize("change", ["content", "exchange", "remove"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_changes_after_it_was_found_is_not_read(folder, change, kind, open_rows):
    path = folder / f"a.{kind}"
    if kind == "parquet":
        (folder / "a.jsonl").unlink()
        datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]).to_parquet(str(path))
    rows = open_rows(folder)
    data = path.read_bytes()
    if change != "content":
        path.unlink()
    if change != "remove":
        path.write_bytes(data + data)
    with pytest.raises(UserError, match=rf"a.{kind}.*(changed while it was read|No such file)"):
        rows.count()


def test_an_evaluation_source_takes_its_own_split(folder):
    (folder / "a.jsonl").rename(folder / "train.jsonl")
    (folder / "test.jsonl").write_text("{}\n")
    assert [file.name for file in find_source(folder, FIELD).files] == ["train.jsonl"]
    assert [file.name for file in find_source(folder, EVAL_FIELD).files] == ["test.jsonl"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_folder_that_becomes_a_link_after_it_was_found_is_not_read(folder, kind, open_rows):
    (folder / "sub").mkdir()
    if kind == "parquet":
        (folder / "a.jsonl").unlink()
        row = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
        row.to_parquet(str(folder / "sub" / "b.parquet"))
    else:
        shutil.copy(folder / "a.jsonl", folder / "sub" / "b.jsonl")
    rows = open_rows(folder)
    (folder / "sub").rename(folder.parent / "elsewhere")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(UserError, match=rf"sub/b.{kind}.*changed while it was read"):
        rows.count()


def test_a_name_that_is_no_utf8_is_read_and_can_be_written_in_a_message(folder, read_rows, places):
    (folder / "a.jsonl").rename(folder / os.fsdecode(b"\xff.jsonl"))
    assert read_rows(folder) == [{"prompt": "a", "completion": "b"}]
    assert [str(place).encode() for place in places(folder)] == [rb"1 (\xff.jsonl, line 1)"]


def test_more_files_than_are_read_end_the_search(folder, monkeypatch):
    monkeypatch.setattr(source_module, "MOST_FILES", 3)
    for number in range(3):
        (folder / f"{number}.jsonl").write_text("{}\n")
    refused(folder, "has more than 3 files")
