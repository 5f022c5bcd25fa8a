"""Every command in the documents exists, and those that can be run here are run."""

from __future__ import annotations

import re

import pytest
import typer
import yaml

from docs.blocks import CLASSES, PAGES, REPOSITORY, all_blocks, missing, shell_blocks
from docs.commands import NoCommandError, check, simple_commands
from qlora_api.job import QLoRAJob
from qlora_api.sweep.sweep import QLoRASweep
from qlora_cli.app import app
from qlora_trainer.tasks.definitions import read_definition

LANGUAGES = {"", "json", "promql", "python", "sh", "yaml"}
SHELL = all_blocks("sh")
RUN = [page for page in PAGES if shell_blocks(page, "run")]
A_JOB = yaml.safe_load((REPOSITORY / "examples" / "cluster" / "one-gpu.yaml").read_text())


def name(value):
    return value.where if hasattr(value, "where") else str(value.relative_to(REPOSITORY))


def test_there_are_blocks_of_every_class_and_none_of_another():
    assert {block.test for block in SHELL} == set(CLASSES)
    assert not [block.where for block in SHELL if block.test not in CLASSES]


def test_no_block_hides_from_the_tests_behind_a_language():
    for page in PAGES:
        fences = re.findall(r"^```+(\w*)", page.read_text("utf-8"), re.MULTILINE)[::2]
        assert set(fences) <= LANGUAGES, page


@pytest.mark.parametrize("block", SHELL, ids=name)
def test_programs_commands_options_and_files_exist(block):
    check(block.text)


@pytest.mark.parametrize("page", RUN, ids=name)
def test_commands_do_what_the_page_says(page, finished):
    for block, shown in shell_blocks(page, "run"):
        done = finished.shell(block.text)
        assert done.returncode == block.exit_code, f"{block.where}\n{done.stdout}"
        assert not missing(shown, done.stdout), f"{block.where}\n{done.stdout}"


@pytest.mark.parametrize("page", ["README.md", "docs/reference/command-line.md"])
def test_every_command_is_named(page):
    text = (REPOSITORY / page).read_text("utf-8")
    commands = typer.main.get_command(app).commands
    assert len(commands) > 20
    assert not [name for name in commands if not re.search(rf"`(qlora )?{name}\b", text)]


def test_the_demo_says_what_it_does(capsys):
    from demo.demo import say

    say("helm install …", "Ctrl-C ends it.")
    assert capsys.readouterr().out == "helm install …\nCtrl-C ends it.\n"


# ---------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=name)
def test_yaml_is_a_job_a_part_of_its_spec_a_task_or_values_of_the_chart(block, tmp_path):
    body = yaml.safe_load(block.text)
    if body.get("kind") == "QLoRAJob":
        QLoRAJob.from_manifest(body)
    elif body.get("kind") == "QLoRASweep":
        QLoRASweep.from_manifest(body)
    elif body.get("kind") == "ConfigMap":  # of another tool
        assert all(isinstance(text, str) for text in body["data"].values())
    elif "task" in body:
        (tmp_path / "task.yaml").write_text(block.text)
        for file in body["dataset_kwargs"]["data_files"].values():
            (tmp_path / file).touch()
        assert read_definition(tmp_path, body["task"]) is not None
    elif set(body) == {"spec"}:
        groups = {
            group: {**A_JOB["spec"].get(group, {}), **fields} if isinstance(fields, dict) else fields
            for group, fields in body["spec"].items()
        }
        QLoRAJob.from_manifest({**A_JOB, "spec": {**A_JOB["spec"], **groups}})
    else:
        values = yaml.safe_load((REPOSITORY / "charts" / "qlora-operator" / "values.yaml").read_text())
        assert not list(unknown(body, values))


def unknown(given, known, path=""):
    """Keys that the chart has not."""
    for key, value in given.items():
        if key not in known:
            yield f"{path}{key}"
        elif isinstance(value, dict) and isinstance(known[key], dict) and known[key]:
            yield from unknown(value, known[key], f"{path}{key}.")


# ------------------------------------------------------------------------------------------------------ of the checker


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("qlora trian job.yaml", "No such command"),
        ("qlora plan job.yaml --gpuu h100-80gb", "No such option"),
        ("qlora plan", "[Mm]issing"),
        ("ls | qlora show", "[Mm]issing"),
        ("kubectl gte qlorajobs", "kubectl gte"),
        ("helm install q charts/qlora-operator --set trainer.imag.tag=1", "trainer.imag.tag is no value"),
        ("kubectl apply --filename examples/none.yaml", "examples/none.yaml is not there"),
        ("make rnu", "no such target"),
        ("qlroa run job.yaml", "no program"),
    ],
)
def test_what_does_not_exist_is_found(text, complaint):
    with pytest.raises(NoCommandError, match=complaint):
        check(text)


def test_a_block_is_taken_apart_as_a_shell_does():
    text = "a 'b c' \\\n  d > out && e | f  # no\ncat > x <<'END'\nno command\nEND\ng\n"
    assert list(simple_commands(text)) == [["a", "b c", "d"], ["e"], ["f"], ["cat"], ["g"]]
