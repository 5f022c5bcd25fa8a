"""The processes of tracking tools where the cache's disk fails, or the attempt is stopped."""

from __future__ import annotations

import socket
import subprocess

import pytest

from qlora_api.batch import split_batch
from qlora_api.contract import ExitCode, TrainerConfig
from qlora_trainer.python_process import python_command
from qlora_trainer.reporting.training_history import PUBLISHED_FILE
from qlora_trainer.worker.stop import Stop
from qlora_trainer.worker.tracking_processes import send_published, tracking_processes
from testing.timeouts import PATIENCE_SECONDS
from tracking_fixtures import facts_of


def config_of(sink, tmp_path, cache):
    facts = facts_of(sink)
    config = TrainerConfig(
        job=facts.job,
        spec=facts.spec,
        attempt=1,
        batch=split_batch(facts.spec, 1),
        device="CPU",
        ranks_per_worker=1,
        gradient_checkpointing=False,
        checkpoint_uri=str(tmp_path / "checkpoints"),
        cache_dir=str(cache),
        termination_message_path=str(tmp_path / "termination.json"),
    )
    (tmp_path / "config.json").write_text(config.model_dump_json(by_alias=True))
    return config


@pytest.fixture
def config(tmp_path):
    """Return the configuration of an attempt whose cache cannot be written to."""
    (tmp_path / "file").touch()
    return config_of({"type": "TensorBoard", "folder": str(tmp_path / "board")}, tmp_path, tmp_path / "file" / "cache")


@pytest.fixture
def adapter(tmp_path):
    """Return the folder of a published adapter with its history."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / PUBLISHED_FILE).write_bytes(b"")
    return str(tmp_path / "adapter")


def test_an_attempt_trains_without_tools_where_the_cache_cannot_be_written_to(config, tmp_path, caplog):
    with tracking_processes(config, tmp_path / "config.json", 0, Stop()) as tracking:
        assert (tracking.rank_environment, tracking.processes) == ({}, [])
        tracking.finish(config, ExitCode.DONE)
    assert f"tracking tools get nothing of this attempt: the cache cannot be written to: {tmp_path}" in caplog.text


def test_a_published_run_is_done_where_the_cache_cannot_be_written_to(config, adapter, tmp_path, caplog):
    send_published(config, tmp_path / "config.json", Stop(), adapter)
    assert "the cache cannot be written to" in caplog.text


SEND_PUBLISHED = """
import signal
import sys
from pathlib import Path

from qlora_api.contract import TrainerConfig
from qlora_trainer.worker.stop import Stop
from qlora_trainer.worker.tracking_processes import send_published

path, adapter = Path(sys.argv[1]), sys.argv[2]
stop = Stop()
signal.signal(signal.SIGTERM, stop)
send_published(TrainerConfig.model_validate_json(path.read_text()), path, stop, adapter)
"""
"""A process of its own: the signal is passed on to all children of the process that gets it."""


def test_a_published_run_is_done_where_it_is_stopped_while_a_tool_does_not_answer(adapter, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_SECONDS)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        config_of({"type": "MLflow", "server": url}, tmp_path, tmp_path)
        command = (*python_command(), "-c", SEND_PUBLISHED, str(tmp_path / "config.json"), adapter)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = server.accept()
            with connection:
                process.terminate()
                _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert "may not have the last steps of the published run: stopped by SIGTERM" in errors
