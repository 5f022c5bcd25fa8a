"""Tracking tools beside a real training: killed at any moment, each has every step once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import warnings
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from mlflow_runs import metric_steps
from qlora_api.contract import ExitCode
from qlora_api.spec import SinkType
from qlora_api.status import TrackedRun
from qlora_trainer.reporting.training_history import PUBLISHED_FILE
from qlora_trainer.tracking.journal import METRICS
from services.mlflow_server import MLflowServer
from testing.ports import free_port
from testing.timeouts import PATIENCE_SECONDS
from tracking_fixtures import scalars, texts, wandb_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mlflow.exceptions import MlflowException


def published(ended, key):
    """Return step and value of a metric in the published history."""
    lines = (Path(ended.message.adapter.uri) / PUBLISHED_FILE).read_text().splitlines()
    return [(line["step"], line[key]) for line in map(json.loads, lines) if "step" in line and key in line]


def kill(runner, config, step, is_time=lambda: True):
    """Kill the launcher and all that it started, as a lost node would: at ``step``, when it is time."""
    launcher = runner.launch(config)
    everyone = []
    try:
        runner.wait_for_step(launcher, config, step)
        everyone = psutil.Process(launcher.pid).children(recursive=True)
        for process in everyone:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):  # it has ended meanwhile
                if os.getsid(process.pid) == os.getsid(launcher.pid):  # a rank; it goes no further
                    process.suspend()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_time():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        launcher.send_signal(signal.SIGKILL)
        for process in everyone:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    psutil.wait_procs(everyone, timeout=PATIENCE_SECONDS)
    launcher.wait(timeout=PATIENCE_SECONDS)


def changes_of(sinks):
    return {
        "tracking": sinks,
        "training": {"epochs": None, "maxSteps": STEPS, "evaluation": {"everySteps": 5}},
        "checkpoint": {"everySteps": 3},
    }


STEPS = 40
RUN = "tiny-0a1b2c3d"
OF_FLOAT16 = ("lossScale", "skippedSteps")
TIMES = ("seconds", "dataSeconds")


def test_tensorboard_has_each_step_once_after_an_attempt_that_was_killed(runner):
    board = runner.folder / "board"
    changes = changes_of([{"type": "TensorBoard", "folder": str(board)}])
    config, second = (runner.config(attempt, **changes) for attempt in (1, 2))
    assert runner.prepare(config) == ExitCode.DONE
    kill(runner, config, step=5)
    code = runner.launch(second).wait(timeout=PATIENCE_SECONDS)
    ended = runner.ended(second, code)
    assert code == ExitCode.DONE, ended.log
    assert ended.message.tracking == [TrackedRun(type=SinkType.TENSORBOARD, url=str(board / RUN))], ended.log
    found = scalars(board / RUN)
    for key, tag in METRICS.items():
        if key not in OF_FLOAT16:
            assert found[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in published(ended, key)]
    assert [step for step, _ in found["train/loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in found["eval/loss"]] == list(range(0, STEPS + 1, 5))
    assert texts(board / RUN)["adapter"] == ended.message.adapter.uri
    assert "| lora.rank | 8 |" in texts(board / RUN)["parameters"]

    shutil.rmtree(board)  # as if the attempt had been killed when it had published
    third = runner.config(3, **changes)
    assert runner.launch(third).wait(timeout=PATIENCE_SECONDS) == ExitCode.DONE
    ended = runner.ended(third, 0)
    assert ended.message.tracking == [TrackedRun(type=SinkType.TENSORBOARD, url=str(board / RUN))], ended.log
    assert [step for step, _ in scalars(board / RUN)["train/loss"]] == list(range(1, STEPS + 1))


def test_a_server_that_is_not_there_ends_prepare_and_not_a_run_that_has_begun(runner):
    server = f"http://127.0.0.1:{free_port()}"
    config = runner.config(tracking=[{"type": "MLflow", "server": server}])
    assert runner.prepare(config) == ExitCode.STORAGE_FAILED
    ended = runner.ended(config, ExitCode.STORAGE_FAILED)
    assert f"spec.tracking[0].server: {server} does not take the run" in ended.text
    assert runner.prepare(runner.config()) == ExitCode.DONE
    assert runner.prepare(config) == ExitCode.DONE


@pytest.fixture
def mlflow_server(tmp_path):
    with MLflowServer(tmp_path / "mlflow") as running:
        yield running


def test_each_tool_has_each_step_once_after_ten_attempts_that_were_killed(runner, mlflow_server, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(runner.folder))
    board = runner.folder / "board"
    sinks = [
        {"type": "TensorBoard", "folder": str(board)},
        {"type": "MLflow", "server": mlflow_server.url},
        {"type": "WandB"},
    ]
    changes = changes_of(sinks)
    assert runner.prepare(runner.config(**changes)) == ExitCode.DONE
    for attempt, step in enumerate((1, 2, 4, 5, 7, 8, 10, 11, 13, 14), start=1):
        config = runner.config(attempt, **changes)

        def is_time(step=step):
            """Every second time, wait until the server has a step of which there may be no checkpoint yet."""
            if step % 2 == 0 or step == 1:
                return True
            try:
                return step - 1 in dict(metric_steps(mlflow_server.url, "train/loss"))
            except (MlflowException, ValueError):  # a busy server may refuse a question, or has no run yet
                return False

        kill(runner, config, step, is_time)
    last = runner.config(11, **changes)
    code = runner.launch(last).wait(timeout=PATIENCE_SECONDS)
    ended = runner.ended(last, code)
    assert code == ExitCode.DONE, ended.log
    assert [run.message for run in ended.message.tracking] == ["", "", ""], ended.log
    assert [step for step, _ in published(ended, "loss")] == list(range(1, STEPS + 1))
    (folder,) = (runner.folder / "wandb").glob("offline-run-*")
    rows = wandb_rows(folder)
    for key, tag in METRICS.items():
        if key in OF_FLOAT16:
            continue
        expected = [(step, pytest.approx(value, rel=1e-4)) for step, value in published(ended, key)]
        assert scalars(board / RUN)[tag] == expected
        assert [(row["_step"], row[tag]) for row in rows if tag in row] == expected
        sent = metric_steps(mlflow_server.url, tag)
        assert [step for step, _ in sent] == [step for step, _ in expected]
        if key not in TIMES:  # of a step that was trained twice MLflow has the first one's
            assert sent == expected
