"""Test the wheel of a release as a kubectl user installs it: the command line without PyTorch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from services.images import package_index

REPOSITORY = Path(__file__).parents[2]
UV = Path(sys.executable).parent / "uv"
PROGRAMS = ["kubectl-qlora", "kubectl_complete-qlora", "qlora"]
JOB = """\
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata: {name: tune}
spec:
  model: {source: "hf://org/model@main"}
  dataset: {train: {source: "s3://data/rows.jsonl"}, format: Messages, maxLength: 512}
  training: {epochs: 1, globalBatchSize: 8, learningRate: "2e-4"}
  output: {destination: "s3://data/out"}
"""
CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder of the programs that ``uv tool install`` makes from the wheel of this tree."""
    work = tmp_path_factory.mktemp("wheel")
    env = {
        **os.environ,
        **{name: value for name, value in package_index().items() if value},
        "UV_TOOL_DIR": str(work / "tools"),
        "UV_TOOL_BIN_DIR": str(work / "bin"),
        "UV_CONSTRAINT": str(REPOSITORY / "constraints.txt"),
    }
    _run(UV, "build", "--quiet", "--wheel", "--no-build-isolation", "--out-dir", work / "dist", cwd=REPOSITORY, env=env)
    (wheel,) = (work / "dist").glob("*.whl")
    _run(UV, "tool", "install", "--quiet", "--python", sys.executable, wheel, env=env)
    return work / "bin"


def _run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_installs_the_command_line_without_pytorch(installed):
    assert sorted(program.name for program in installed.iterdir()) == PROGRAMS
    (site,) = installed.parent.glob("tools/qlora-operator/lib/*/site-packages")
    packages = {path.name for path in site.iterdir()}
    assert {"qlora", "qlora_api", "qlora_cli", "qlora_memory", "qlora_storage"} <= packages
    assert not packages & {"torch", "transformers", "deepspeed", "kopf", "kubernetes", "qlora_operator"}
    assert re.fullmatch(r"qlora \d+\.\d+\.\d+\n", _run(installed / "qlora", "--version"))


@pytest.mark.parametrize("program", ["qlora", "kubectl-qlora"])
def test_the_installed_commands_validate_and_plan(installed, tmp_path, program):
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    qlora = installed / program
    assert "submit" in _run(qlora, "--help", cwd=tmp_path)
    assert _run(qlora, "validate", "job.yaml", cwd=tmp_path) == "job.yaml: tune is valid\n"
    plan = _run(qlora, "plan", "job.yaml", "--gpu", "h100-80gb", "--model-config", "config.json", cwd=tmp_path)
    assert "Memory of one GPU" in plan


def test_a_command_that_needs_the_trainer_says_how_to_install_it(installed, tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    done = subprocess.run(
        [installed / "qlora", "run", "job.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 40
    assert "qlora-operator[trainer]" in done.stderr
