"""A local folder of task definitions is read in place, and nothing that its links lead to elsewhere."""

from __future__ import annotations

import pytest

from qlora_storage import object_store
from qlora_trainer.errors import UserError
from qlora_trainer.storage.fetch_definitions import definitions_identity, fetch_definitions


@pytest.fixture
def claims(tmp_path, monkeypatch):
    """Return where claims are mounted: one with definitions, beside another one."""
    mounted = tmp_path / "claims"
    monkeypatch.setattr(object_store, "PVC_MOUNT", mounted)
    for claim in ("own", "other"):
        (mounted / claim / "tasks").mkdir(parents=True)
        (mounted / claim / "tasks/quiz.yaml").write_text("task: quiz")
    return mounted


def readers(tmp_path):
    return (definitions_identity, lambda source: fetch_definitions(source, tmp_path / "cache"))


def test_links_within_the_folder_are_followed(claims, tmp_path):
    (claims / "own/tasks/again.jsonl").symlink_to("quiz.yaml")
    assert fetch_definitions("pvc://own/tasks", tmp_path) == claims / "own/tasks"
    assert [line.split()[0] for line in definitions_identity("pvc://own/tasks").splitlines()] == [
        "again.jsonl",
        "quiz.yaml",
    ]


@pytest.mark.parametrize("name", ["link.yaml", "rows.jsonl"])
def test_a_link_to_a_file_elsewhere_is_refused(name, claims, tmp_path):
    (claims / "own/tasks" / name).symlink_to(claims / "other/tasks/quiz.yaml")
    for read in readers(tmp_path):
        with pytest.raises(UserError, match=rf"has a link that leads out of it: {name}"):
            read("pvc://own/tasks")


def test_a_folder_that_is_a_link_out_of_its_claim_is_refused(claims, tmp_path):
    (claims / "own/link").symlink_to(claims / "other/tasks")
    for read in readers(tmp_path):
        with pytest.raises(UserError, match="leads out of its claim by a link"):
            read("pvc://own/link")
