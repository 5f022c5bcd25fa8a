"""Ranks that hang or are told to stop at an awkward moment, with the real launcher."""

from __future__ import annotations

import json
import signal
import urllib.request

import pytest

from qlora_api.contract import ExitCode, ProgressReport
from qlora_api.status import Reason
from testing.timeouts import PATIENCE_SECONDS

pytestmark = pytest.mark.ranks
ENDLESS = {"training": {"epochs": None, "maxSteps": 5000}, "policy": {"stallTimeoutSeconds": 30}}


def progress(runner, config):
    port = (runner.folder / f"ports-{config.attempt}" / "rank-0.port").read_text()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress") as answer:
        return ProgressReport.model_validate_json(answer.read())


def test_a_stopped_rank_is_shown_then_named_by_rank_node_and_section_before_the_collective_gives_up(
    runner, monkeypatch
):
    monkeypatch.setenv("NODE_NAME", "node-seven")
    config = runner.config(**ENDLESS)
    assert runner.prepare(config) == 0
    process = runner.launch(config)
    try:
        runner.wait_for_step(process, config, 3)
        before = progress(runner, config)
        runner.ranks(process)[1].suspend()
        code = process.wait(timeout=PATIENCE_SECONDS)
    finally:
        process.terminate()
    ended = runner.ended(config, code)
    assert code == ExitCode.STALLED, ended.log[-3000:]
    assert ended.message.reason is Reason.STALLED
    assert ended.message.rank == 1
    assert "rank 1 on node-seven has given no sign of life for" in ended.text
    assert "stopped by a signal" in ended.text
    assert "timed out" not in ended.log, "the watchdog speaks before a collective gives up"
    assert before.longest_step_seconds > 0
    assert before.slowest.node == "node-seven"
    assert before.slowest.seconds >= before.slowest.median_seconds


def test_sigterm_during_an_evaluation_does_not_wait_for_its_end(runner):
    rows = [json.loads(line) for line in runner.rows.read_text().splitlines()]
    many = runner.folder / "many.jsonl"
    many.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    changes = {
        "dataset": {"train": {"source": str(many)}, "eval": {"fraction": "0.5"}, "packing": False},
        "training": {"epochs": None, "maxSteps": 50, "evaluation": {"everySteps": 3}},
    }
    config = runner.config(**changes)
    assert runner.prepare(config) == 0
    log = runner.folder / "log-1.txt"
    process = runner.launch(config)
    try:
        runner.wait_for_step(process, config, 3)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=PATIENCE_SECONDS)
    finally:
        process.terminate()
    ended = runner.ended(config, code)
    assert code == ExitCode.PREEMPTED, ended.log[-2000:]
    assert "step 3 of 50; a checkpoint is written" in ended.text
    assert "step 3 eval loss" not in log.read_text()
