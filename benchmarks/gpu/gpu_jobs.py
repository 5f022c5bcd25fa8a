"""Whole jobs on this machine's GPU by ``qlora run``: one to its end, one stopped and resumed, one short of memory.

python benchmarks/gpu/gpu_jobs.py OUT.json [whole stopped limited] [--mib 896]

The quickstart's base and rows, made first by ``examples/quickstart/prepare.py --out runs/quickstart-data``. docs/gpu.md
has what came out. ``whole`` and ``stopped`` run on a CPU too, where they take minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DATA = ROOT / "runs" / "quickstart-data"
TRAINING = {"epochs": None, "maxSteps": 30, "evaluation": {"everySteps": 15}}
SHORT = {"epochs": None, "maxSteps": 6, "warmupSteps": 2, "globalBatchSize": 128, "evaluation": {"everySteps": 6}}
LIMIT_SECONDS = 900
STOP_AT = 13
"""Step after which ``stopped`` gets SIGTERM."""


class Job:
    """A job in a folder of its own, with a cache of its own."""

    def __init__(self, folder: Path, name: str, **changes: dict[str, Any]) -> None:
        self.name, self.folder = name, folder
        manifest = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
        manifest["metadata"]["name"] = name
        spec = manifest["spec"]
        spec["model"]["source"] = str(DATA / "base")
        spec["dataset"]["train"]["source"] = str(DATA / "train.jsonl")
        spec["dataset"]["eval"]["source"] = str(DATA / "eval.jsonl")
        spec["output"]["destination"] = str(folder / f"out-{name}")
        for group, fields in changes.items():
            merged = {**spec.get(group, {}), **fields}
            spec[group] = {key: value for key, value in merged.items() if value is not None}
        (folder / f"{name}.yaml").write_text(json.dumps(manifest))

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start it, or go on with it."""
        own = {"QLORA_CACHE": str(self.folder / f"cache-{self.name}"), "OMP_NUM_THREADS": "4"}
        command = [sys.executable, "-m", "qlora_cli", "run", f"{self.name}.yaml"]
        with (self.folder / f"{self.name}.console").open("ab") as console:
            return subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, **own, **environment}, stdout=console, stderr=console
            )

    def run(self, **environment: str) -> dict[str, Any]:
        """Run it to its end; what there is to know of it."""
        began = time.monotonic()
        code = self.start(**environment).wait(timeout=LIMIT_SECONDS)
        return {"code": code, "seconds": round(time.monotonic() - began, 1), **self.found()}

    def found(self) -> dict[str, Any]:
        """Attempts, losses by step, and what was published."""
        record = json.loads((self.folder / "runs" / self.name / "run.json").read_text())
        log = "".join(path.read_text() for path in self.logs())
        published = sorted((self.folder / f"out-{self.name}").rglob("adapter_model.safetensors"))
        return {
            "attempts": record["attempts"],
            "memory": (record.get("result") or {}).get("memory"),
            "losses": {int(n): float(x) for n, x in re.findall(r" INFO step (\d+)/\d+ loss ([\d.]+) lr", log)},
            "evaluations": {int(n): float(x) for n, x in re.findall(r"step (\d+) eval loss ([\d.]+)", log)},
            "adapter": [hashlib.sha256(path.read_bytes()).hexdigest() for path in published],
        }

    def logs(self) -> list[Path]:
        return sorted((self.folder / "runs" / self.name).glob("attempt-*/log.txt"))


def whole(folder: Path, _: float) -> dict[str, Any]:
    """From manifest to verified adapter."""
    return Job(folder, "whole", training=TRAINING, checkpoint={"everySteps": 10}).run()


def stopped(folder: Path, _: float) -> dict[str, Any]:
    """The same, with a SIGTERM on the way: its losses and its adapter must be those of ``whole``."""
    job = Job(folder, "stopped", training=TRAINING, checkpoint={"everySteps": 10})
    process = job.start()
    while process.poll() is None and not any(f" step {STOP_AT}/" in log.read_text() for log in job.logs()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=LIMIT_SECONDS)
    return job.run()


def limited(folder: Path, mib: float) -> dict[str, Any]:
    """A job whose first micro-batch does not fit, beside one that had from the start what that one ended with."""
    import torch  # noqa: PLC0415 only this one needs to know the card

    total = torch.cuda.get_device_properties(0).total_memory / 2**20
    short = {**SHORT, "gradientCheckpointing": "None"}
    rest = {"parallelism": {"zeroStage": 0}, "checkpoint": {"everySteps": 100}}
    fraction = f"per_process_memory_fraction:{mib / total:.6f}"
    first = Job(folder, "limited", training={**short, "microBatchSize": 128}, **rest).run(PYTORCH_ALLOC_CONF=fraction)
    fits = first["attempts"][-1]["microBatchSize"]
    beside = Job(folder, "small", training={**short, "microBatchSize": fits}, **rest).run()
    return {**first, "beside": beside}


JOBS = {"whole": whole, "stopped": stopped, "limited": limited}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="for the findings, as JSON")
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], default=[*JOBS])
    parser.add_argument("--mib", type=float, default=896, help="of GPU memory that 'limited' may use")
    arguments = parser.parse_args()
    findings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="qlora-gpu-jobs-") as name:
        for job in arguments.jobs or JOBS:
            findings[job] = JOBS[job](Path(name), arguments.mib)
            arguments.out.write_text(json.dumps(findings, indent=2) + "\n")
            tried = [(a["microBatchSize"], a.get("reason")) for a in findings[job]["attempts"]]
            print(job, "exit code", findings[job]["code"], tried, findings[job]["evaluations"], flush=True)
    if {"whole", "stopped"} <= findings.keys():
        same = [findings["whole"][what] == findings["stopped"][what] for what in ("losses", "adapter")]
        print("stopped and resumed: losses the same", same[0], "- adapter the same", same[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
