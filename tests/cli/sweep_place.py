"""A folder to sweep in, with a manifest and the fake trainer."""

import io
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from qlora_cli.local.machine import Machine
from qlora_cli.sweeps.run_sweep import SweepRequest, run_sweep
from qlora_cli.text import kubernetes_yaml

CALL = Path(__file__).with_name("call_sweep.py")


class SweepPlace:
    """One folder to sweep in; ``said`` is the output of the newest call."""

    def __init__(self, workplace, job):
        self.folder, self.workplace, self.said = workplace.folder, workplace, ""
        self.runs = workplace.folder / "runs" / "search"
        self._job = job
        self.plan()
        self.write()

    def plan(self, **plan):
        self.workplace.plan("learn", **plan)

    def write(self, job=None, **spec):
        template = {**self._job["spec"], **(job or {})}
        template["training"] = {**template["training"], "evaluation": {"everySteps": 2}}
        document = {
            "apiVersion": "qlora.dev/v1alpha1",
            "kind": "QLoRASweep",
            "metadata": {"name": "search"},
            "spec": {
                "template": {"spec": template},
                "parameters": [
                    {"path": "lora.rank", "choices": [8, 16]},
                    {"path": "training.learningRate", "choices": ["1e-4", "1e-3"]},
                ],
                "algorithm": {"type": "Grid"},
                "maxTrials": 4,
                **spec,
            },
        }
        (self.folder / "sweep.yaml").write_text(kubernetes_yaml.dump(document))

    def run(self, **options):
        console = Console(file=io.StringIO(), width=160, markup=False, emoji=False, highlight=False)
        try:
            return run_sweep(SweepRequest(Path("sweep.yaml"), **options), console, self.workplace.commands(), Machine())
        finally:
            self.said = console.file.getvalue()

    def start(self):
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(CALL), "plan.json", "sweep.yaml"],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def result(self):
        return json.loads((self.folder / "out" / "sweep.json").read_text())

    def trial(self, number):
        return json.loads((self.runs / "trials" / f"search-{number}" / "run.json").read_text())

    def steps(self, number):
        """The steps that a trial's attempts have taken, in their order."""
        path = self.runs / "trials" / f"search-{number}" / "steps"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def outcome(self):
        """Return the best and the trials, without what depends on times and names of runs."""
        found = self.result()
        plain = ("number", "parameters", "state", "step", "value", "pauseAtStep")
        return found["best"]["number"], [{name: trial.get(name) for name in plain} for trial in found["trials"]]
