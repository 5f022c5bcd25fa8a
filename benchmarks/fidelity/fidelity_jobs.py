"""Runs of the trainer for ``fidelity.py``: real processes, started as the operator starts them, read by their logs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_api.batch import BatchSplit
from qlora_api.contract import ExitCode, JobRef, TerminationMessage, TrainerConfig
from qlora_api.spec import QLoRAJobSpec

_STEP = re.compile(r" step (\d+)/(\d+) loss (\S+) ")
_EVAL = re.compile(r" step (\d+) eval loss (\S+) ")
PATIENCE_SECONDS = 1800
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
EMULATED_FLOAT16 = Path(__file__).with_name("emulated_float16.py")


@dataclass(frozen=True)
class SizedData:
    """A base and rows, cut to a size."""

    base: Path
    train: Path
    eval: Path
    epochs: int


@dataclass(frozen=True)
class AttemptLog:
    """One attempt, by its log."""

    code: int
    losses: dict[int, float]
    """By step, from 1."""
    eval_losses: dict[int, float]
    total_steps: int


def head(source: Path, target: Path, count: int) -> Path:
    """Write every n-th line of a file, ``count`` of them."""
    lines = source.read_text("utf-8").splitlines(keepends=True)
    stride = max(1, len(lines) // count)
    target.write_text("".join(lines[::stride][:count]), "utf-8")
    return target


@dataclass(frozen=True)
class TrainerRun:
    """One run of the trainer, in a folder of its own."""

    name: str
    folder: Path
    config: TrainerConfig
    emulates_float16: bool = False
    """Its ranks take the CPU's slow float16 for hardware's."""

    @property
    def checkpoints(self) -> Path:
        return Path(self.config.checkpoint_uri)

    @property
    def last_checkpoint(self) -> Path:
        """The newest one's files, of the last attempt that wrote some."""
        newest = max(p for p in self.checkpoints.glob("step-*") if (p / "COMPLETE.json").exists())
        return max(newest.glob("attempt-*"), key=lambda folder: int(folder.name.removeprefix("attempt-")))

    @property
    def message(self) -> TerminationMessage:
        return TerminationMessage.model_validate_json(Path(self.config.termination_message_path).read_bytes())

    def run(self) -> AttemptLog:
        """Run to the end.

        Raises:
            RuntimeError: the attempt failed.

        """
        ended = self._wait(self._start())
        if ended.code != ExitCode.DONE:
            raise RuntimeError(f"{self.name} ended with {ended.code}:\n{self._log.read_text()[-3000:]}")
        return ended

    def run_until(self, step: int) -> AttemptLog:
        """Send SIGTERM to the launcher as soon as the log shows ``step``.

        Raises:
            RuntimeError: the attempt did not end as one that was preempted.

        """
        process = self._start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while f" step {step}/" not in self._log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        ended = self._wait(process)
        if ended.code != ExitCode.PREEMPTED:
            raise RuntimeError(f"{self.name}, told to stop, ended with {ended.code}:\n{self._log.read_text()[-3000:]}")
        return ended

    def again(self) -> TrainerRun:
        """The next attempt of the same run."""
        config = self.config.model_copy(update={"attempt": self.config.attempt + 1})
        return TrainerRun(self.name, self.folder, config)

    @property
    def _log(self) -> Path:
        return self.folder / f"log-{self.config.attempt}.txt"

    def _start(self) -> subprocess.Popen[bytes]:
        path = self.folder / f"config-{self.config.attempt}.json"
        path.write_text(self.config.model_dump_json(by_alias=True))
        Path(self.config.termination_message_path).unlink(missing_ok=True)
        print(f"  {self.name}, attempt {self.config.attempt}", flush=True)
        with self._log.open("w") as log:
            command = [sys.executable, "-m", "qlora_trainer", str(path)]
            if self.emulates_float16:
                prepare = [sys.executable, str(EMULATED_FLOAT16), "prepare", str(path)]
                subprocess.run(prepare, check=True, stdout=log, stderr=log)
                ranks = str(self.config.ranks_per_worker)
                command = [sys.executable, *TORCHRUN, ranks, str(EMULATED_FLOAT16), "rank", str(path)]
            # The same threads whatever the ranks: sums of bf16 products depend on how they are cut.
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def _wait(self, process: subprocess.Popen[bytes]) -> AttemptLog:
        try:
            code = process.wait(PATIENCE_SECONDS)
        finally:
            process.kill()
        log = self._log.read_text()
        steps = _STEP.findall(log)
        return AttemptLog(
            code,
            {int(step): float(loss) for step, _, loss in steps},
            {int(step): float(loss) for step, loss in _EVAL.findall(log)},
            int(steps[-1][1]) if steps else 0,
        )


def job(name: str, work: Path, rows: SizedData, *, ranks: int = 2, **changes: dict[str, Any]) -> TrainerRun:
    """Describe a run of 8 packs a step; ``changes`` are laid over its spec, group by group."""
    micro, batch = 2, 8
    spec: dict[str, Any] = {
        "model": {"source": str(rows.base)},
        "dataset": {
            "train": {"source": str(rows.train)},
            "eval": {"source": str(rows.eval)},
            "format": "PromptCompletion",
            "maxLength": 256,
            "longRows": "Drop",
        },
        "training": {
            "epochs": rows.epochs,
            "globalBatchSize": batch,
            "microBatchSize": micro,
            "learningRate": "2e-3",
            "warmupSteps": 4,
        },
        "output": {"destination": str(work / name / "out")},
    }
    for group, fields in changes.items():
        spec[group] = {**spec.get(group, {}), **fields}
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainerConfig(
        job=JobRef(name=name, uid=f"fidelity-{name}"),
        spec=QLoRAJobSpec.model_validate(spec),
        batch=BatchSplit(world_size=ranks, micro_batch_size=micro, gradient_accumulation_steps=batch // micro // ranks),
        device="CPU",
        ranks_per_worker=ranks,
        gradient_checkpointing=False,
        checkpoint_uri=str(folder / "checkpoints"),
        cache_dir=str(work / "cache"),
        termination_message_path=str(folder / "message.json"),
        metrics_port=0,
        metrics_host="127.0.0.1",
    )
    return TrainerRun(name, folder, config)


def checkpoint_files(folder: Path) -> dict[str, int]:
    """Bytes of each file of a checkpoint."""
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir())}


def tensor_names(file: Path) -> dict[str, int]:
    """Bytes of each tensor in a safetensors file, from its header."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }
