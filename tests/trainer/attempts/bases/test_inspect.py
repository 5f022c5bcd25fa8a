"""``qlora inspect`` on a base, and a job that leaves in 16 bits what it names."""

from __future__ import annotations

import json
import subprocess
import sys

from qlora_api.contract import ExitCode


def qlora(*arguments):
    return subprocess.run([sys.executable, "-m", "qlora_cli", *arguments], capture_output=True, text=True, check=False)


def test_the_layers_that_inspect_names_are_planned_and_prepared(runner):
    page = runner.folder / "pages" / "inspect.html"
    done = qlora("inspect", str(runner.model), "--skip", "2", "-o", "json", "--html", str(page))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["skipModules"]) == 2
    assert "‖W - Q(W)‖" in page.read_text()
    changes = {"quantization": {"skipModules": found["skipModules"], "computeType": "BFloat16"}}
    assert runner.prepare(runner.config(**changes)) == 0
    spec = runner.spec(**changes)
    manifest = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": {"name": "a"}, "spec": spec}
    (runner.folder / "job.yaml").write_text(json.dumps(manifest))
    planned = qlora("plan", str(runner.folder / "job.yaml"), "--gpu", "h100-80gb", "-o", "json")
    assert planned.returncode == 0, planned.stderr
    model = json.loads(planned.stdout)["model"]
    assert (model["skippedLayers"], model["skippedBytes"]) == (2, found["skippedBytes"])


def test_a_base_that_is_not_there_is_a_sentence(tmp_path):
    done = qlora("inspect", str(tmp_path / "nothing"))
    assert done.returncode == ExitCode.USER_ERROR
    assert done.stderr.startswith("MODEL: ")
    assert "\n" not in done.stderr.strip()
