"""The process that began Prepare serves the stage that Prepare is in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from qlora_api.batch import split_batch
from qlora_api.contract import JobRef, TrainerConfig
from qlora_api.spec import QLoRAJobSpec
from qlora_trainer.prepare.stage_progress import ENVIRONMENT, FIRST, begin_stage, served_progress
from testing.timeouts import PATIENCE_SECONDS

SPEC = {
    "model": {"source": "/base"},
    "dataset": {"train": {"source": "/rows"}, "format": "Text"},
    "training": {"maxSteps": 10, "globalBatchSize": 4},
    "output": {"destination": "/out"},
}
OF_ANOTHER_PROCESS = "from qlora_trainer.prepare.stage_progress import begin_stage; begin_stage('tokenizing the rows')"


def config(port):
    spec = QLoRAJobSpec.model_validate(SPEC)
    return TrainerConfig(
        job=JobRef(name="one", namespace="team", uid="u"),
        spec=spec,
        batch=split_batch(spec, 1),
        device="CPU",
        ranks_per_worker=1,
        gradient_checkpointing=False,
        checkpoint_uri="/c",
        cache_dir="/cache",
        termination_message_path="/t",
        metrics_port=port,
        metrics_host="127.0.0.1",
    )


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def asked(port, path="/progress"):
    with urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_SECONDS) as answer:
        return json.load(answer)


def test_a_stage_that_another_process_begins_is_told_with_the_time_in_it(port):
    with served_progress(config(port)):
        first = asked(port)
        subprocess.run([sys.executable, "-c", OF_ANOTHER_PROCESS], check=True, timeout=PATIENCE_SECONDS)
        then = asked(port)
    assert (first["job"], first["attempt"], first["section"], first["stage"]) == ("one", 0, "Prepare", FIRST)
    assert then["stage"] == "tokenizing the rows"
    assert 0 <= then["stageSeconds"] < PATIENCE_SECONDS
    assert ENVIRONMENT not in os.environ
    with pytest.raises(OSError, match="refused"):
        asked(port)


def test_nothing_else_is_served(port):
    with served_progress(config(port)), pytest.raises(HTTPError, match="404"):
        asked(port, "/metrics")


def test_a_port_that_is_taken_ends_nothing(caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken, served_progress(config(taken.getsockname()[1])):
        begin_stage("fetching the rows")
    assert "progress is not served at port" in caplog.text


def test_without_a_port_nobody_is_served_and_stages_are_in_the_log(caplog):
    caplog.set_level("INFO")
    with served_progress(config(0)):
        assert ENVIRONMENT not in os.environ
        begin_stage("fetching the rows")
    assert caplog.messages == ["stage: fetching the rows"]
