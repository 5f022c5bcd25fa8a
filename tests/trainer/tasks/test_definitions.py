"""Definitions of a user's own tasks: settings are taken, code and files elsewhere are not."""

from __future__ import annotations

import json

import pytest

from qlora_trainer.tasks.definitions import MOST_BYTES, DefinitionError, read_definition

GOOD = {
    "task": "quiz",
    "output_type": "multiple_choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows/quiz.jsonl"}},
    "test_split": "test",
    "doc_to_text": "{{q}}",
    "doc_to_target": "label",
    "doc_to_choice": ["a", "b"],
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def folder(tmp_path):
    """Return a folder of definitions with rows, beside a file that is not in it."""
    (tmp_path / "secret.jsonl").write_text("{}")
    (tmp_path / "secret.yaml").write_text("description: no\n")
    (tmp_path / "tasks/rows").mkdir(parents=True)
    (tmp_path / "tasks/rows/quiz.jsonl").write_text("{}")
    return tmp_path / "tasks"


def write(folder, name="quiz.yaml", text=None, **changes):
    settings = {key: value for key, value in (GOOD | changes).items() if value is not None}
    (folder / name).write_text(json.dumps(settings) if text is None else text)


def test_a_definition_names_its_rows_by_their_place_on_this_machine(folder):
    write(folder)
    found = read_definition(folder, "quiz")
    assert found == GOOD | {"dataset_kwargs": {"data_files": {"test": str(folder / "rows/quiz.jsonl")}}, "metadata": {}}
    assert read_definition(folder, "other") is None


def test_a_definition_has_the_settings_of_the_files_that_it_includes(folder):
    write(folder, "base.yaml", task=None, description="from the base")
    write(folder, include="base.yaml", doc_to_text=None)
    found = read_definition(folder, "quiz")
    assert (found["description"], found["doc_to_text"]) == ("from the base", "{{q}}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": "task: quiz\ndoc_to_text: !function evil.run\n"}, "Python code (!function) is not taken"),
        ({"text": 'task: "quiz"\nx: !!python/object/apply:os.system ["id"]\n'}, "cannot be read as plain YAML"),
        ({"text": "task: quiz\n" + "#" * MOST_BYTES}, "of more than 1 MiB"),
        ({"class": "evil.Task"}, "with class; of a definition these are taken"),
        ({"process_docs": "evil.py"}, "with process_docs"),
        ({"use_prompt": "promptsource:x"}, "with use_prompt"),
        ({"unsafe_code": True}, "with unsafe_code"),
        ({"output_type": "generate_until"}, "must be one of multiple_choice, loglikelihood"),
        ({"output_type": None}, "must be one of"),
        ({"doc_to_text": None}, "without doc_to_text"),
        ({"doc_to_text": ["a"]}, "without doc_to_text, which must be text"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "whose metric_list has"),
        ({"metric_list": "acc"}, "whose metric_list is no list"),
        ({"dataset_kwargs": {"data_files": "../secret.jsonl"}}, "names ../secret.jsonl, which is no file of it"),
        ({"dataset_kwargs": {"data_files": ["/etc/passwd"]}}, "names /etc/passwd, which is no file of it"),
        ({"dataset_kwargs": {"data_files": None}}, "which is no file of it"),
        ({"dataset_kwargs": {"data_files": "rows/quiz.jsonl", "trust_remote_code": True}}, "has trust_remote_code"),
        ({"include": "../secret.yaml"}, "which is no file of the folder"),
        ({"include": "quiz.yaml"}, "includes itself"),
    ],
    ids=str,
)
def test_code_and_files_elsewhere_are_refused(folder, changes, words):
    write(folder, **changes)
    with pytest.raises(DefinitionError) as refused:
        read_definition(folder, "quiz")
    assert words in str(refused.value)


def test_links_out_of_the_folder_are_refused(folder):
    (folder / "rows/link.jsonl").symlink_to(folder.parent / "secret.jsonl")
    write(folder, dataset_kwargs={"data_files": "rows/link.jsonl"})
    with pytest.raises(DefinitionError, match="is no file of it"):
        read_definition(folder, "quiz")


def test_a_task_that_is_defined_twice_is_refused_and_files_of_another_purpose_are_left_alone(folder):
    write(folder)
    (folder / "notes.yaml").write_text("- a list\n")
    (folder / "broken.yml").write_text("a: [\n")
    assert read_definition(folder, "quiz") is not None
    write(folder, "again.yml")
    with pytest.raises(DefinitionError, match=r"defines quiz twice, in again\.yml and quiz\.yaml"):
        read_definition(folder, "quiz")
