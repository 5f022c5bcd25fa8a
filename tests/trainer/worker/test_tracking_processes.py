"""The processes of tracking tools where the cache's disk fails."""

from __future__ import annotations

import pytest

from qlora_api.batch import split_batch
from qlora_api.contract import ExitCode, TrainerConfig
from qlora_trainer.reporting.training_history import PUBLISHED_FILE
from qlora_trainer.worker.stop import Stop
from qlora_trainer.worker.tracking_processes import send_published, tracking_processes
from tracking_fixtures import facts_of


@pytest.fixture
def config(tmp_path):
    """Return the configuration of an attempt whose cache cannot be written to."""
    (tmp_path / "file").touch()
    facts = facts_of({"type": "TensorBoard", "folder": str(tmp_path / "board")})
    return TrainerConfig(
        job=facts.job,
        spec=facts.spec,
        attempt=1,
        batch=split_batch(facts.spec, 1),
        device="CPU",
        ranks_per_worker=1,
        gradient_checkpointing=False,
        checkpoint_uri=str(tmp_path / "checkpoints"),
        cache_dir=str(tmp_path / "file" / "cache"),
        termination_message_path=str(tmp_path / "termination.json"),
    )


def test_an_attempt_trains_without_tools_where_the_cache_cannot_be_written_to(config, tmp_path, caplog):
    with tracking_processes(config, tmp_path / "config.json", 0, Stop()) as tracking:
        assert (tracking.rank_environment, tracking.processes) == ({}, [])
        tracking.finish(config, ExitCode.DONE)
    assert f"tracking tools get nothing of this attempt: the cache cannot be written to: {tmp_path}" in caplog.text


def test_a_published_run_is_done_where_the_cache_cannot_be_written_to(config, tmp_path, caplog):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / PUBLISHED_FILE).write_bytes(b"")
    send_published(config, tmp_path / "config.json", Stop(), str(tmp_path / "adapter"))
    assert "the cache cannot be written to" in caplog.text
