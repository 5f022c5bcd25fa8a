"""The trainer's process that measures a base: what it prints, and how it fails."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qlora_cli.app import app
from qlora_cli.inspection.measure import InspectionError, measure
from qlora_cli.local.trainer_process import Commands

LAYER = (
    '{"name": "layers.%d.q_proj", "outputs": 2, "inputs": 2, "experts": 1, "squares": 1.0, "errors": {},'
    ' "constants": {}, "outliers": {}, "largest": 1.0}'
)


def run(script):
    return measure("base", Console(file=io.StringIO()), Commands(inspect=("sh", "-c", script)))


def test_only_the_trainers_lines_are_read():
    lines = ["Loading …", '{"layers": 2}', LAYER % 10, "{config: of a library}", '{"loss": 1}', "[]", LAYER % 9]
    found = run("".join(f"echo '{line}'; " for line in lines) + r"printf '\377\n'")
    assert [layer.name for layer in found.layers] == ["layers.9.q_proj", "layers.10.q_proj"]


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        pytest.param("kill -9 $$", 137, "The trainer ended with exit code 137.", id="killed"),
        pytest.param("exit 40", 40, "The trainer ended with exit code 40.", id="silent"),
        pytest.param("echo 'a warning\nMODEL: no such base' >&2; exit 40", 40, "MODEL: no such base", id="user-error"),
        pytest.param(
            "echo 'disk full' >&2; exit 47", 47, "disk full\nThe trainer ended with exit code 47.", id="storage-failed"
        ),
        pytest.param(r"printf 'Tr\377' >&2; exit 1", 1, "Tr\ufffd\nThe trainer ended with exit code 1.", id="crashed"),
    ],
)
def test_a_failure_is_told_with_the_trainers_exit_code(script, code, message):
    with pytest.raises(InspectionError) as failed:
        run(script)
    assert (failed.value.exit_code, str(failed.value)) == (code, message)


def test_the_command_exits_with_the_trainers_code(monkeypatch):
    failing = Commands(inspect=("sh", "-c", "exit 47"))
    monkeypatch.setattr("qlora_cli.local.trainer_process.Commands", lambda: failing)
    done = CliRunner().invoke(app, ["inspect", "base"])
    assert (done.exit_code, done.stdout, done.stderr) == (47, "", "The trainer ended with exit code 47.\n")


def test_without_the_trainer_the_command_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    done = CliRunner().invoke(app, ["inspect", "base"])
    assert done.exit_code == 40
    assert done.stderr.startswith("qlora inspect runs the trainer (PyTorch, DeepSpeed), which is not installed here; ")
