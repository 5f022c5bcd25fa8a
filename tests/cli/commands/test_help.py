"""The help of every command: its sentences fit, its options are explained, its exit codes are listed."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from qlora_api.contract import ExitCode
from qlora_cli.app import app
from qlora_cli.commands import exit_codes

COMMANDS = typer.main.get_command(app).commands


def help_of(*command):
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*command, "--help"])
    assert done.exit_code == 0
    return done.stdout


def listed_codes(text):
    return {int(code) for code in re.findall(r"^  (\d+) ", text.partition("\nExit codes:\n")[2], re.MULTILINE)}


def test_the_first_sentence_of_every_command_is_listed_whole():
    commands = help_of().partition("\nCommands:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in commands.splitlines()] == list(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("..") for line in commands.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_and_option_has_a_sentence_and_no_python_type(command):
    text = help_of(command)
    assert max(map(len, text.splitlines())) <= 80
    assert "<list" not in text
    assert "<path>" not in text
    for parameter in COMMANDS[command].params:
        assert (parameter.help or "").endswith("."), parameter.name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_lists_its_exit_codes(command):
    codes = listed_codes(help_of(command))
    assert {0, 2, exit_codes.STORAGE_FAILED, 130} <= codes <= {*ExitCode, 2, 3, 130}
    asks_a_cluster = any(parameter.name == "kubeconfig" for parameter in COMMANDS[command].params)
    assert (exit_codes.UNREACHABLE in codes) == asks_a_cluster


def test_the_exit_codes_of_run_are_those_of_the_trainer():
    assert listed_codes(help_of("run")) == {*ExitCode, 2, 130}


def test_exit_codes_are_listed_of_commands_that_exist():
    assert exit_codes._CODES.keys() <= COMMANDS.keys()
