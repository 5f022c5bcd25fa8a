"""Verification of what is published, byte by byte: what was changed since is found."""

import json

import pytest

from qlora_storage.object_store import open_store
from qlora_trainer import verify
from qlora_trainer.errors import UserError
from qlora_trainer.publish.publisher import publish, verify_published
from storage_fixtures import edit_json


def _alter(store, key):
    data = store.get(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        pytest.param(_alter, "is not what was published: its SHA-256 differs", id="changed"),
        pytest.param(lambda store, key: store.delete(key), "is missing", id="missing"),
        pytest.param(lambda store, key: store.put(f"{key}.py", b"import os"), "is not in the manifest", id="added"),
    ],
)
def test_tampering_is_found_and_stops_a_second_publish(place, tmp_path, make_adapter, make_facts, job, tamper, problem):
    adapter = publish(place, job, 1, make_adapter(tmp_path / "out"), make_facts())
    tamper(open_store(place, "x"), "3f2a9c01-attempt-1/adapter/adapter_model.safetensors")
    (found,) = verify_published(adapter.manifest_uri)
    assert problem in found
    with pytest.raises(UserError, match=r"holds this run's manifest, but .*; delete .*manifest\.json"):
        publish(place, job, 1, make_adapter(tmp_path / "again"), make_facts())


def test_a_manifest_cannot_point_outside_its_folder(tmp_path, make_adapter, make_facts, job):
    publish(str(tmp_path / "to"), job, 1, make_adapter(tmp_path / "out"), make_facts())
    path = tmp_path / "to" / "manifest.json"
    entry = {"path": "../../etc/passwd", "size": 1, "sha256": "0" * 64}
    edit_json(path, files=[*json.loads(path.read_text())["files"], entry])
    assert ["outside its folder" in p for p in verify_published(str(path))] == [True]


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        pytest.param(lambda f: None, 0, "every file is what was published", id="whole"),
        pytest.param(lambda f: next(f.rglob("README.md")).unlink(), 1, "README.md is missing", id="incomplete"),
        pytest.param(lambda f: (f / "manifest.json").unlink(), 40, "does not exist", id="no-manifest"),
    ],
)
def test_a_person_can_verify_from_the_command_line(
    tmp_path, make_adapter, make_facts, job, monkeypatch, capsys, spoil, code, said
):
    publish(str(tmp_path / "to"), job, 1, make_adapter(tmp_path / "out"), make_facts())
    spoil(tmp_path / "to")
    monkeypatch.chdir(tmp_path / "to")
    assert verify.main(["manifest.json"]) == code
    assert said in "".join(capsys.readouterr())


def test_verifying_what_is_not_there_says_so(place):
    with pytest.raises(UserError, match="does not exist"):
        verify_published(f"{place}/manifest.json")
