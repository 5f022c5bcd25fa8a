"""Measure the command line's processor time: ``python benchmarks/bench_cli.py``

Each command as a process of its own, several times; the figure is the median of its processor seconds by that of a bare
``python -c pass`` in the same run, so that a slow machine gives the same ratios.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

JOB = """\
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata: {name: bench}
spec:
  model: {source: hf://org/base@main}
  dataset: {train: {source: rows.jsonl}, format: Text}
  training: {epochs: 1}
  output: {destination: out}
"""
CONFIG = """\
{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
 "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": false}
"""
QLORA = "from qlora_cli.app import app; app()"
PLANNED = ("--gpu", "h100-80gb", "--model-config", "config.json")
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "qlora --help": ["-c", QLORA, "--help"],
    "qlora explain spec": ["-c", QLORA, "explain", "spec"],
    "qlora plan --what-if": ["-c", QLORA, "plan", "job.yaml", "--what-if", *PLANNED],
}
BARS = {"qlora --help": 20, "qlora explain spec": 70, "qlora plan --what-if": 130}
"""Most that a command may take, by a bare interpreter's start of 15 to 25 ms."""


def cpu_seconds(arguments: list[str], folder: Path) -> float:
    """Run a command, and return its processor seconds.

    Raises:
        SystemExit: it failed.

    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the processor time of the command line.")
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory(prefix="qlora-bench-cli-") as name:
        folder = Path(name)
        (folder / "job.yaml").write_text(JOB)
        (folder / "config.json").write_text(CONFIG)
        for _ in range(repeats):
            for command, arguments in COMMANDS.items():
                seconds[command].append(cpu_seconds(arguments, folder))
    medians = {command: statistics.median(found) for command, found in seconds.items()}
    bare, met = medians["python -c pass"], True
    print("| command | CPU ms | × bare interpreter | bar |\n| --- | --- | --- | --- |")
    for command, median in medians.items():
        bar = BARS.get(command)
        holds = bar is None or median <= bar * bare
        met = met and holds
        verdict = "" if bar is None else f"≤ {bar} × {'met' if holds else 'MISSED'}"
        print(f"| `{command}` | {median * 1000:.0f} | {median / bare:.1f} | {verdict} |")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
