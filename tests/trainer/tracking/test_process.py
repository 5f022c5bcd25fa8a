"""The process of one sink, as the launcher starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings

import pytest

from qlora_api.batch import split_batch
from qlora_api.contract import TrainerConfig
from qlora_trainer.tracking.journal import FOLDER_ENVIRONMENT, JOURNAL_FILE, encoded, end_line
from qlora_trainer.tracking.tracked_runs import read_runs
from services.mlflow_server import MLflowServer
from testing.timeouts import PATIENCE_SECONDS
from tracking_fixtures import facts_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mlflow.tracking import MlflowClient


class SinkProcess:
    """A process and the folder in which it meets rank 0 and the launcher."""

    def __init__(self, folder, sink):
        self.folder = folder
        facts = facts_of(sink)
        config = TrainerConfig(
            job=facts.job,
            spec=facts.spec,
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

    def end(self):
        """Close its input, and return its exit code."""
        self.process.stdin.close()
        return self.process.wait(PATIENCE_SECONDS)


@pytest.fixture
def started(tmp_path):
    processes = []

    def start(sink):
        processes.append(SinkProcess(tmp_path, sink))
        return processes[-1]

    yield start
    for each in processes:
        each.process.kill()
        each.process.wait()
        each.process.stdin.close()


def test_a_server_that_was_away_gets_each_step_once_when_it_is_back(started, tmp_path):
    with MLflowServer(tmp_path / "mlflow") as server:
        client = MlflowClient(server.url)
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
        (run,) = client.search_runs([client.get_experiment_by_name("qlora").experiment_id])
        assert run.info.status == "FINISHED"
        losses = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(each.step for each in losses) == list(range(1, 13))


def test_a_process_whose_launcher_was_killed_ends(started, tmp_path):
    sink = started({"type": "TensorBoard", "folder": str(tmp_path / "board")})
    sink.train(1, 5)
    sink.wait_until(lambda run: run.url)
    assert sink.end() == 1
    assert json.loads((tmp_path / "sink-0.json").read_text())["message"] == ""
