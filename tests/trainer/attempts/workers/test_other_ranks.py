"""A run goes on with another number of ranks than it was stopped on: the same rows in the same order, the same loss."""

from __future__ import annotations

import hashlib
import json

import pytest

from qlora_api.batch import BatchSplit
from qlora_api.contract import ExitCode
from qlora_trainer.data.batches import Batches
from qlora_trainer.prepare.local_copy import PreparedInputs
from qlora_trainer.prepare.tokenize_rows import load_prepared_data

pytestmark = pytest.mark.ranks

STAGES = [
    pytest.param({"training": {"optimizer": "PagedAdamW8Bit"}, "parallelism": {"zeroStage": 0}}, id="zero-0-8-bit"),
    pytest.param({"training": {"optimizer": "AdamW"}, "parallelism": {"zeroStage": 1}}, id="zero-1-32-bit"),
    pytest.param({"training": {"optimizer": "PagedAdamW8Bit"}, "parallelism": {"zeroStage": 2}}, id="zero-2-8-bit"),
]


def job(runner, attempt, ranks, changes):
    training = {"globalBatchSize": 12, "microBatchSize": 1, **changes.get("training", {})}
    changes = {**changes, "training": training, "checkpoint": {"everySteps": 2, "keep": 99}}
    return runner.config(attempt=attempt, ranks=ranks, **changes)


def seen_rows(runner):
    """Step → hash over all rows seen until then, in their order, as the checkpoints say."""
    markers = (runner.folder / "checkpoints").glob("step-*/COMPLETE.json")
    runs = [json.loads(path.read_text())["checkpoint"]["meta"]["run"] for path in markers]
    return {run["step"]: run["rows_sha256"] for run in runs}


def rows_in_order(config, steps):
    """The same, from the order of the data itself."""
    data = load_prepared_data(PreparedInputs.read(config).data_dir)
    split = BatchSplit(world_size=1, micro_batch_size=12, gradient_accumulation_steps=1)
    batches = Batches(data.train, data.train_packs, split, 0, config.spec.training.seed)
    chain, hashes = "", {}
    for step in range(steps):
        chain = hashlib.sha256(chain.encode() + batches.step(step).rows.tobytes()).hexdigest()
        hashes[step + 1] = chain
    return hashes


@pytest.mark.parametrize("changes", STAGES)
def test_four_ranks_then_two_then_three_train_as_four_do_from_start_to_end(changes, runner):
    runner.prepare(job(runner, 1, 4, changes))
    first = runner.kill_at(job(runner, 1, 4, changes), step=3)
    second = runner.kill_at(job(runner, 2, 2, changes), step=7)
    last = job(runner, 3, 3, changes)
    third = runner.run(last)
    assert third.code == ExitCode.DONE, third.log[-3000:]
    assert (min(second.losses), min(third.losses)) == (3, 7), "each goes on from the newest checkpoint"
    order = seen_rows(runner)
    interrupted = {**first.losses, **second.losses, **third.losses}

    for name in ("checkpoints", "out"):
        (runner.folder / name).rename(runner.folder / f"{name}-of-the-interrupted")
    whole = runner.run(job(runner, 4, 4, changes))
    assert whole.code == ExitCode.DONE, whole.log[-3000:]
    steps = max(whole.losses)
    assert order == seen_rows(runner)
    assert order.items() <= rows_in_order(last, steps).items()
    assert sorted(order) == list(range(2, steps + 1, 2))
    assert interrupted == pytest.approx(whole.losses, abs=1e-3)
    assert third.losses[steps] == pytest.approx(whole.losses[steps], abs=1e-3)


def test_under_zero_3_another_number_of_ranks_is_refused_with_what_to_do(runner):
    changes = {"parallelism": {"zeroStage": 3}}
    runner.prepare(job(runner, 1, 2, changes))
    runner.kill_at(job(runner, 1, 2, changes), step=3)
    ended = runner.run(job(runner, 2, 1, changes))
    assert ended.code == ExitCode.USER_ERROR, ended.log[-2000:]
    assert "spec.parallelism.zeroStage: 3 binds" in ended.text
    assert "go on with 2 ranks instead of 1" in ended.text
    assert "zeroStage 0, 1 or 2" in ended.text
