"""A workplace: an empty folder with a manifest, a model, rows and a plan for the fake trainer."""

import importlib.util
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from qlora_cli.local.machine import Machine
from qlora_cli.local.run import RunRequest, run
from testing.timeouts import PATIENCE_SECONDS

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from cluster_fixtures import _no_cluster_of_the_machines_own, golden  # noqa: E402, F401 fixtures

CPUS_ONLY = Machine()


def _load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


commands = _load("call_run").commands


def manifest():
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": "quick"},
        "spec": {
            "model": {"source": "model"},
            "dataset": {"train": {"source": "rows.jsonl"}, "eval": {"fraction": "0.1"}, "format": "Messages"},
            "training": {"epochs": 2, "globalBatchSize": 16, "microBatchSize": 4},
            "output": {"destination": "out"},
        },
    }


class Workplace:
    """One folder to run in; ``said`` is the output of the newest call."""

    def __init__(self, folder):
        self.folder = folder
        self.run_folder = folder / "runs" / "quick"
        self.said = ""
        (folder / "model").mkdir()
        (folder / "rows.jsonl").write_text("{}\n")
        self.write(manifest())
        self.plan("done")

    def write(self, *documents):
        (self.folder / "job.yaml").write_text(yaml.safe_dump_all(documents, sort_keys=False))

    def plan(self, *attempts, **more):
        (self.folder / "plan.json").write_text(json.dumps({"attempts": attempts, **more}))

    def commands(self):
        return commands(self.folder / "plan.json")

    def run(self, *overrides, machine=CPUS_ONLY, name=None, **options):
        """Call 'qlora run' in this process; its exit code."""
        if name:
            self.write({**manifest(), "metadata": {"name": name}})
        console = Console(file=io.StringIO(), width=160, markup=False, emoji=False, highlight=False)
        request = RunRequest(Path("job.yaml"), overrides=overrides, **options)
        try:
            return run(request, console, self.commands(), machine)
        finally:
            self.said = console.file.getvalue()

    def start(self):
        """Call it as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(HERE / "call_run.py"), "plan.json", "job.yaml"],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process):
        """Wait for it; its exit code."""
        self.said = process.communicate(timeout=PATIENCE_SECONDS)[0]
        return process.returncode

    def record(self):
        return json.loads((self.run_folder / "run.json").read_text())

    def config(self, attempt):
        return json.loads((self.run_folder / f"attempt-{attempt}" / "config.json").read_text())

    def wait_for_port(self, attempt=1):
        """Until the fake trainer of an attempt serves, and so has set its signal handlers."""
        wait_until((self.run_folder / f"attempt-{attempt}" / "rank-0.port").exists)


def wait_until(condition, seconds=PATIENCE_SECONDS):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def lives(pid):
    """Return whether a process is there and no zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    before = signal.getsignal(signal.SIGINT)
    yield Workplace(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before, "signal handlers are given back"


@pytest.fixture
def sweep_place(workplace):
    from sweep_place import SweepPlace

    return SweepPlace(workplace, manifest())


@pytest.fixture
def helpers():
    """Return what tests share besides the workplace."""
    return SimpleNamespace(wait_until=wait_until, lives=lives, manifest=manifest)
