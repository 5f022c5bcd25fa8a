"""Whole attempts through the real launcher: they learn, stop, resume, fall back and publish."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_api.contract import ExitCode
from qlora_api.status import Reason
from qlora_trainer.prepare.command import prepare
from qlora_trainer.publish.publisher import verify_published
from testing.timeouts import PATIENCE_SECONDS

pytestmark = pytest.mark.ranks


def test_a_job_learns_and_ends_with_a_verified_adapter_that_plain_peft_loads(runner):
    ended = runner.run(runner.config(output={"merge": "BFloat16"}, parallelism={"zeroStage": 2}))
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    message = ended.message
    assert message.reason is Reason.COMPLETED
    assert float(message.progress.best_eval_loss) < ended.losses[1] - 0.1
    assert verify_published(message.adapter.manifest_uri) == []
    manifest = json.loads(Path(message.adapter.manifest_uri).read_text())
    assert manifest["metrics"]["baseEvalLoss"] > manifest["metrics"]["evalLoss"]
    assert message.tokens == manifest["metrics"]["tokens"] > 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runner.model), message.adapter.uri)
    merged = AutoModelForCausalLM.from_pretrained(Path(message.adapter.uri).parent / "merged")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        adapted = model(ids).logits
        assert torch.allclose(adapted, merged(ids).logits, atol=0.1)
        with model.disable_adapter():
            assert not torch.allclose(adapted, model(ids).logits, atol=0.1)
    assert set(message.memory.measured) == {
        "quantizedWeights",
        "quantizationConstants",
        "unquantizedWeights",
        "adapterWeights",
        "gradients",
        "optimizerState",
        "peak",
    }


def test_a_checkpoint_holds_no_frozen_weight(runner):
    assert runner.run(runner.config(training={"epochs": None, "maxSteps": 2})).code == ExitCode.DONE
    names = set()
    for path in (runner.folder / "checkpoints").glob("step-*/*/*.safetensors"):
        with safe_open(path, "pt") as tensors:
            names |= {f"{path.name}: {name}" for name in tensors.keys()}  # noqa: SIM118 no mapping
    adapter = {n for n in names if n.startswith("adapter")}
    assert adapter
    assert all("lora_A" in n or "lora_B" in n for n in adapter)
    assert not any(word in n for n in names for word in ("base_layer", "embed", "norm", "lm_head"))


@pytest.mark.parametrize("stage", [0, 2], ids=["zero-0", "zero-2"])
def test_a_run_stopped_in_its_second_epoch_goes_on_as_if_it_had_not_been(stage, runner):
    changes = {"parallelism": {"zeroStage": stage}, "lora": {"rank": 8, "dropout": "0.1"}}
    first = runner.stop_at(runner.config(**changes), step=epoch_steps(runner.config(**changes)) + 3)
    assert first.code == ExitCode.PREEMPTED, first.log[-3000:]
    assert first.message.reason is Reason.PREEMPTED
    assert "a checkpoint is written" in first.text
    stopped = max(first.losses)
    second = runner.run(runner.config(attempt=2, **changes))
    assert second.code == ExitCode.DONE, second.log[-3000:]
    assert min(second.losses) == stopped + 1
    shutil.rmtree(runner.folder / "checkpoints")
    shutil.rmtree(runner.folder / "out")
    whole = runner.run(runner.config(attempt=3, **changes))
    assert {**first.losses, **second.losses} == pytest.approx(whole.losses, rel=1e-4)


def test_a_run_paused_twice_goes_on_as_if_it_had_not_been(runner):
    """The steps are no multiples of everySteps of the checkpoints; both pauses come after an evaluation."""
    changes = {
        "parallelism": {"zeroStage": 2},
        "lora": {"rank": 8, "dropout": "0.1"},
        "training": {"epochs": None, "maxSteps": 12, "evaluation": {"everySteps": 2}},
        "checkpoint": {"everySteps": 5},
    }
    paused, losses, reasons, first_steps = [], {}, [], []
    for attempt, pause in ((1, 4), (2, 8), (3, 12)):  # at the last step there is no pause
        ended = runner.run(runner.config(attempt=attempt, pause=pause, **changes))
        paused.append((ended.code, ended.message.progress.step, ended.message.progress.best_eval_loss))
        losses |= ended.losses
        reasons.append(ended.message.reason)
        first_steps.append(ended.message.first_step)
    assert first_steps == [0, 4, 8]
    assert reasons == [Reason.PAUSED, Reason.PAUSED, Reason.COMPLETED]
    assert [each[:2] for each in paused] == [(ExitCode.PREEMPTED, 4), (ExitCode.PREEMPTED, 8), (ExitCode.DONE, 12)]
    assert "paused at step 4 of 12; a checkpoint is written" in (runner.folder / "log-1.txt").read_text()
    assert float(paused[0][2]) > float(paused[1][2]) > float(paused[2][2])  # what the trials of a sweep are compared by
    shutil.rmtree(runner.folder / "checkpoints")
    shutil.rmtree(runner.folder / "out")
    whole = runner.run(runner.config(attempt=4, **changes))
    assert losses == pytest.approx(whole.losses, rel=1e-4)
    assert paused[2][2] == whole.message.progress.best_eval_loss


def epoch_steps(config):
    return -(-prepare(config).train_sequences // config.batch.global_batch_size)


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(runner):
    changes = {"checkpoint": {"everySteps": 2}, "training": {"epochs": None, "maxSteps": 8}}
    first = runner.run(runner.config(**changes))
    assert first.code == ExitCode.DONE
    newest = max((runner.folder / "checkpoints").iterdir())
    damaged = newest / "attempt-1" / "adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    shutil.rmtree(runner.folder / "out")
    second = runner.run(runner.config(attempt=2, **changes))
    assert second.code == ExitCode.DONE, second.log[-3000:]
    assert f"{newest.name}/attempt-1/adapter.safetensors" in second.log
    assert sorted(second.losses) == [7, 8]
    assert second.losses == pytest.approx({s: first.losses[s] for s in (7, 8)}, rel=1e-4)


def test_when_every_checkpoint_is_broken_the_attempt_says_so(runner):
    changes = {"training": {"epochs": None, "maxSteps": 2}}
    assert runner.run(runner.config(**changes)).code == ExitCode.DONE
    shutil.rmtree(runner.folder / "out")
    for path in (runner.folder / "checkpoints").glob("*/*/adapter.safetensors"):
        path.write_bytes(b"")
    ended = runner.run(runner.config(attempt=2, **changes))
    assert ended.code == ExitCode.CHECKPOINT_UNREADABLE
    assert "adapter.safetensors" in ended.text


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(runner):
    model = shutil.copytree(runner.model, runner.folder / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    changes = {"model": {"source": str(model)}, "dataset": {"eval": None}, "training": {"epochs": None, "maxSteps": 3}}
    ended = runner.run(runner.config(**changes))
    assert ended.code == ExitCode.NON_FINITE_LOSS, ended.log[-3000:]
    assert "the loss of step 1 is" in ended.text
    assert "the update was not applied" in ended.text
    assert ended.log.count("the update was not applied") == 2  # both ranks
    assert not list(runner.folder.glob("checkpoints/*"))


def test_training_stops_when_the_eval_loss_gets_no_better(runner):
    changes = {
        "training": {
            "epochs": None,
            "maxSteps": 40,
            "learningRate": "0.3",
            "evaluation": {"everySteps": 1, "patience": 2},
        },
        "output": {"allowWorseEval": True},
    }
    ended = runner.run(runner.config(**changes))
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    assert max(ended.losses) < 40
    manifest = json.loads((runner.folder / "out" / "manifest.json").read_text())
    assert manifest["metrics"]["step"] <= max(ended.losses) - 2 or manifest["metrics"]["step"] == 1


def test_the_best_checkpoint_outlives_newer_ones_and_is_published(runner):
    changes = {
        "training": {"epochs": None, "maxSteps": 8, "learningRate": "0.3", "evaluation": {"everySteps": 2}},
        "checkpoint": {"everySteps": 1, "keep": 1},
        "output": {"allowWorseEval": True},
    }
    ended = runner.run(runner.config(**changes))
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    manifest = json.loads((runner.folder / "out" / "manifest.json").read_text())
    best = min(
        float(line.split("eval loss ")[1].split()[0])
        for line in ended.log.splitlines()
        if " eval loss " in line and "step 0 " not in line
    )
    assert manifest["metrics"]["evalLoss"] == pytest.approx(best, abs=1e-5)
    kept = {int(p.name.removeprefix("step-")) for p in (runner.folder / "checkpoints").iterdir()}
    assert kept == {8, manifest["metrics"]["step"]}


def test_a_rank_that_is_killed_is_named_and_the_others_do_not_wait(runner):
    config = runner.config(training={"epochs": None, "maxSteps": 500})
    assert runner.prepare(config) == 0
    process = runner.launch(config)
    try:
        runner.wait_for_step(process, config, 2)
        runner.ranks(process)[1].kill()
        code = process.wait(timeout=PATIENCE_SECONDS)
    finally:
        process.terminate()
    ended = runner.ended(config, code)
    assert code == ExitCode.CRASHED
    assert ended.message.reason is Reason.CRASHED, "nobody ran out of memory"
    assert re.search(r"rank 1 on \S+ was killed by SIGKILL in \w+ of step \d+", ended.text)
    assert ended.message.progress.step >= 2


def test_a_finished_run_is_not_trained_again_even_if_all_else_is_gone(runner):
    changes = {"training": {"epochs": None, "maxSteps": 2}}
    first = runner.run(runner.config(**changes))
    for folder in (runner.cache, runner.folder / "checkpoints"):
        shutil.rmtree(folder)
    again = runner.config(attempt=2, **changes)
    code = runner.launch(again).wait(timeout=PATIENCE_SECONDS)
    ended = runner.ended(again, code)
    assert code == ExitCode.DONE, ended.log[-2000:]
    assert ended.message.reason is Reason.COMPLETED
    assert ended.message.adapter == first.message.adapter
    assert (ended.message.progress.step, ended.message.progress.total_steps) == (2, 2)
    assert not ended.losses
    assert not runner.cache.exists(), "nothing is prepared for a run that is done"


def test_a_finished_run_whose_adapter_was_damaged_says_so_instead_of_training(runner):
    changes = {"training": {"epochs": None, "maxSteps": 2}}
    first = runner.run(runner.config(**changes))
    (Path(first.message.adapter.uri) / "adapter_model.safetensors").write_bytes(b"")
    again = runner.config(attempt=2, **changes)
    ended = runner.ended(again, runner.launch(again).wait(timeout=PATIENCE_SECONDS))
    assert ended.code == ExitCode.USER_ERROR
    assert "spec.output.destination" in ended.text
    assert "adapter_model.safetensors has 0 bytes where" in ended.text
