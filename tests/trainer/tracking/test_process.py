"""The process of one sink, as the launcher starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from mlflow_runs import metric_steps, only_run
from qlora_api.batch import split_batch
from qlora_api.contract import TrainerConfig
from qlora_api.spec import SinkType
from qlora_trainer.reporting.training_history import TrainingHistory
from qlora_trainer.tracking.__main__ import Report
from qlora_trainer.tracking.journal import FOLDER_ENVIRONMENT, JOURNAL_FILE, Journal, encoded, end_line
from qlora_trainer.tracking.tracked_runs import read_runs
from services.mlflow_server import MLflowServer
from testing.timeouts import PATIENCE_SECONDS
from tracking_fixtures import facts_of, scalars, wandb_rows


class SinkProcess:
    """A process and the folder in which it meets rank 0 and the launcher."""

    def __init__(self, folder, sink, attempt=1):
        self.folder = folder
        facts = facts_of(sink, attempt)
        folder.mkdir(exist_ok=True)
        config = TrainerConfig(
            job=facts.job,
            spec=facts.spec,
            attempt=attempt,
            batch=split_batch(facts.spec, 1),
            device="CPU",
            ranks_per_worker=1,
            gradient_checkpointing=False,
            checkpoint_uri=str(folder),
            cache_dir=str(folder),
            termination_message_path=str(folder / "termination.json"),
        )
        (folder / "config.json").write_text(config.model_dump_json(by_alias=True))
        (folder / JOURNAL_FILE).touch()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qlora_trainer.tracking", str(folder / "config.json"), "0"],
            stdin=subprocess.PIPE,
            env={**os.environ, FOLDER_ENVIRONMENT: str(folder)},
            start_new_session=True,
        )

    def write(self, *lines):
        with (self.folder / JOURNAL_FILE).open("ab") as file:
            file.writelines(encoded(line) for line in lines)

    def train(self, first, last):
        self.write(*({"step": step, "time": 1e9 + step, "loss": 1.0} for step in range(first, last + 1)))

    def wait_until(self, condition):
        """Wait until what the process reports of its run is so."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not any(condition(run) for run in read_runs(self.folder)):
            assert self.process.poll() is None
            assert time.monotonic() < deadline, read_runs(self.folder)
            time.sleep(0.05)

    def kill(self):
        """Kill it and all that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()

    def end(self):
        """Close its input, and return its exit code."""
        self.process.stdin.close()
        return self.process.wait(PATIENCE_SECONDS)


@pytest.fixture
def started(tmp_path):
    processes = []

    def start(sink, attempt=1):
        processes.append(SinkProcess(tmp_path / f"attempt-{attempt}", sink, attempt))
        return processes[-1]

    yield start
    for each in processes:
        if each.process.poll() is None:
            each.kill()


def test_a_server_that_was_away_gets_each_step_once_when_it_is_back(started, tmp_path):
    with MLflowServer(tmp_path / "mlflow") as server:
        sink = started({"type": "MLflow", "server": server.url})
        sink.train(1, 5)
        sink.wait_until(lambda run: run.url)
        server.stop()
        sink.train(6, 9)
        sink.wait_until(lambda run: run.message.startswith(f"spec.tracking[0].server: {server.url} does not take"))
        server.start()
        sink.wait_until(lambda run: not run.message)
        sink.train(10, 12)
        sink.write(end_line(0, ""))
        assert sink.end() == 0
        assert only_run(server.url)[1].info.status == "FINISHED"
        assert metric_steps(server.url, "train/loss") == [(step, 1.0) for step in range(1, 13)]


def test_a_process_whose_launcher_was_killed_ends(started, tmp_path):
    sink = started({"type": "TensorBoard", "folder": str(tmp_path / "board")})
    sink.train(1, 5)
    sink.wait_until(lambda run: run.url)
    assert sink.end() == 1
    assert json.loads((sink.folder / "sink-0.json").read_text())["message"] == ""


STEPS = 40
MOMENTS = (1, 2, 4, 5, 7, 11, 16, 22, 29, 37)
"""Steps after which an attempt is killed; a checkpoint is taken at every third step."""


def killed_at_each_moment(started, sink):
    """Run attempts until the last one ends well; each is killed once the tool has some of its steps, or before."""
    saved = b""
    for attempt, moment in enumerate((*MOMENTS, STEPS), start=1):
        process = started(sink, attempt)
        with closing(Journal(process.folder / JOURNAL_FILE)) as journal:
            history = TrainingHistory(journal)
            history.resume(saved)
            first = max((line["step"] for line in map(json.loads, saved.splitlines()) if "loss" in line), default=0)
            history.attempt(attempt, first)
            for step in range(first + 1, moment + 1):
                history.step(step, loss=float(step))
                if step % 5 == 0:
                    history.evaluation(step, step / 2)
                if step % 3 == 0:
                    saved = history.to_bytes()
        if moment == STEPS:
            process.write(end_line(0, "s3://adapters/tiny"))
            assert process.end() == 0
        elif attempt % 3:
            process.wait_until(lambda run: run.url)
            process.kill()
        else:
            process.kill()  # before it has done anything
    assert read_runs(process.folder)[0].message == ""


LOSSES = [(step, float(step)) for step in range(1, STEPS + 1)]
EVALUATIONS = [(step, step / 2) for step in range(5, STEPS + 1, 5)]


def test_killed_at_ten_moments_tensorboard_has_each_step_once(started, tmp_path):
    killed_at_each_moment(started, {"type": "TensorBoard", "folder": str(tmp_path / "board")})
    found = scalars(tmp_path / "board" / "tiny-0a1b2c3d")
    assert (found["train/loss"], found["eval/loss"]) == (LOSSES, EVALUATIONS)


def test_killed_at_ten_moments_mlflow_has_each_step_once(started, tmp_path):
    with MLflowServer(tmp_path / "mlflow") as server:
        killed_at_each_moment(started, {"type": "MLflow", "server": server.url})
        for name, expected in (("train/loss", LOSSES), ("eval/loss", EVALUATIONS)):
            assert metric_steps(server.url, name) == expected
        assert only_run(server.url)[1].info.status == "FINISHED"


def test_killed_at_ten_moments_wandb_has_each_step_once(started, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    killed_at_each_moment(started, {"type": "WandB"})
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    rows = wandb_rows(folder)
    for name, expected in (("train/loss", LOSSES), ("eval/loss", EVALUATIONS)):
        assert [(row["_step"], row[name]) for row in rows if name in row] == expected


def test_a_run_is_not_written_by_the_service_of_a_program_that_started_the_trainer(started, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SERVICE", "3-1-tcp-localhost-9")  # where nobody answers
    sink = started({"type": "WandB"})
    sink.train(1, 2)
    sink.write(end_line(0, ""))
    assert sink.end() == 0


def test_a_disk_that_fails_does_not_end_the_process(tmp_path, caplog):
    Report(tmp_path / "missing", 0, SinkType.MLFLOW)("", "the server does not answer")
    assert "cannot be written to a file" in caplog.text
