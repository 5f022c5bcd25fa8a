"""The process that runs lm-evaluation-harness: templates reach no Python, and it has no credentials."""

from __future__ import annotations

import json

import pytest
from jinja2.exceptions import SecurityError, UndefinedError

from qlora_trainer.errors import TrainerError, UserError
from qlora_trainer.tasks import run_harness as running
from qlora_trainer.tasks.harness import sandbox
from qlora_trainer.tasks.harness_request import Order, OrderedTask


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{{ rows.append(1) }}",
    ],
)
def test_a_template_reaches_no_python(template):
    with pytest.raises((SecurityError, UndefinedError)):
        sandbox().from_string(template).render(rows=[])


def test_a_template_may_replace_by_expressions_as_in_the_harness():
    assert sandbox().from_string("{{ text | regex_replace('[0-9]+', 'n') }}").render(text="a1b22") == "anbn"


def test_a_definition_that_fails_ends_with_the_tasks_name(tmp_path):
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"q": "a", "label": 0}))
    definition = {
        "task": "quiz",
        "output_type": "multiple_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "quiz.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{ missing }}",
        "doc_to_target": "label",
        "doc_to_choice": ["a", "b"],
    }
    with pytest.raises(UserError, match=r'^spec\.evaluate\.tasks: "quiz" cannot be asked: UndefinedError'):
        running.run_harness(tmp_path, Order(tasks=[OrderedTask(name="quiz", definition=definition)]))


def test_the_process_has_no_credentials_and_its_end_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-strangers")
    monkeypatch.setattr(running, "PROGRAM", "this")  # prints, and leaves no result
    (tmp_path / "this.py").write_text(
        "import os, sys\nsys.exit('secret' if 'not-for-strangers' in str(os.environ) else 'no secret')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TrainerError, match="ended with code 1: no secret"):
        running.run_harness(tmp_path, Order(tasks=[]))
