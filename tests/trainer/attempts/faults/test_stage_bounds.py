"""A base that is too large to be built is refused; a trial that ends the process says nothing, and Prepare goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from qlora_api.contract import ExitCode

CHILD = """
import os, runpy, signal, sys
from qlora_trainer.bounds import Bounds
from qlora_trainer.prepare import fetch_and_tokenize, stages
sys.argv[1:] = sys.argv[-1:]
{change}
runpy.run_module("qlora_trainer.prepare.child", run_name="__main__")
"""
PARENT = (
    "import runpy, sys; sys.executable = {python!r}; runpy.run_module('qlora_trainer.prepare', run_name='__main__')"
)
UNTRIED = "a model of the base's class and few layers could not be tried on a CPU, since it ends the process"


def prepared(runner, change, **model):
    """Run Prepare in processes of its own, whose child is changed; return how it ended, and its log."""
    base = shutil.copytree(runner.model, runner.folder / "model")
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | model))
    python, child = runner.folder / "python", runner.folder / "child.py"
    child.write_text(CHILD.format(change=change))
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {child} "$@"\n')
    python.chmod(0o755)
    config = runner.config(model={"source": str(base)})
    path, log = runner.write(config)
    with log.open("ab") as out:
        command = [sys.executable, "-c", PARENT.format(python=str(python)), str(path)]
        code = subprocess.run(command, stdout=out, stderr=out, env=os.environ, check=False).returncode
    return runner.ended(config, code), log.read_text()


@pytest.mark.parametrize(
    ("bounds", "what"),
    [
        pytest.param("Bounds(seconds=2.0)", "processor time", id="seconds"),
        pytest.param("Bounds(memory_bytes=64 << 20)", "memory", id="memory"),
    ],
)
def test_a_base_of_a_million_layers_ends_prepare_as_the_bases_error(runner, bounds, what):
    change = f"stages.BOUNDS[stages.Stage.MODEL] = {bounds}"
    ended, log = prepared(runner, change, num_hidden_layers=10**6)
    assert ended.code == ExitCode.USER_ERROR, log[-3000:]
    assert ended.text.startswith("spec.model.source: ")
    assert f"takes too much {what} to be built" in ended.text


@pytest.mark.parametrize(
    ("trial", "name"),
    [
        pytest.param("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", id="segfault"),
        pytest.param("sum(iter(int, 1))", "SIGPROF", id="endless"),
    ],
)
def test_a_trial_that_ends_the_process_says_nothing_of_the_base(runner, trial, name):
    change = (
        f"stages.BOUNDS[stages.Stage.TRIAL] = Bounds(seconds=2.0)\nfetch_and_tokenize.try_training = lambda *_: {trial}"
    )
    ended, log = prepared(runner, change)
    assert ended.code == ExitCode.DONE, log[-3000:]
    assert f"{name} ended the trial of the base" in log
    receipt = json.loads(log.splitlines()[-1])
    assert UNTRIED in receipt["notes"]
