"""The compute type of whole attempts: Auto, what a resumed run keeps, and float16 with its loss scale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qlora_api.contract import ExitCode
from qlora_trainer.model.device import compute_type
from qlora_trainer.model.device.hardware import bf16_in_hardware

pytestmark = pytest.mark.ranks
SHORT = {"epochs": None, "maxSteps": 6}
LONG = {"epochs": None, "maxSteps": 40}
"""Killed at step 3, it is not over."""


def history_of(ended):
    lines = (Path(ended.message.adapter.uri) / "training_history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_auto_is_what_this_cpu_is_fast_in_and_stands_in_message_manifest_and_history(runner):
    ended = runner.run(runner.config(training=SHORT))
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    best = "BFloat16" if bf16_in_hardware(torch.device("cpu")) else "Float32"
    manifest = json.loads(Path(ended.message.adapter.manifest_uri).read_text())
    attempts = [line["computeType"] for line in history_of(ended) if "fromStep" in line]
    assert [ended.message.compute_type, manifest["config"]["quantization"]["computeType"], *attempts] == [best] * 3


def test_a_resumed_run_keeps_its_type_and_refuses_another(runner):
    checkpoint = {"everySteps": 2}
    first = runner.config(training=LONG, checkpoint=checkpoint, quantization={"computeType": "Float32"})
    assert runner.prepare(first) == ExitCode.DONE
    runner.kill_at(first, step=3)
    other = runner.config(2, training=LONG, checkpoint=checkpoint, quantization={"computeType": "BFloat16"})
    refused = runner.train(other)
    assert refused.code == ExitCode.USER_ERROR, refused.log[-3000:]
    assert 'spec.quantization.computeType: "BFloat16" differs from Float32' in refused.text
    resumed = runner.train(runner.config(3, training=LONG, checkpoint=checkpoint))
    assert resumed.code == ExitCode.DONE, resumed.log[-3000:]
    assert resumed.message.compute_type == "Float32"


@pytest.mark.parametrize("stage", [0, 2])
def test_float16_skips_overflows_and_resumes_with_its_loss_scale_bit_for_bit(stage, runner, monkeypatch):
    monkeypatch.setenv("TEST_INITIAL_LOSS_SCALE", str(2.0**40))  # some steps overflow before the scale suits
    monkeypatch.setattr(compute_type, "fp16_in_hardware", lambda _: True)
    steps = 40
    changes = {
        "training": {"epochs": None, "maxSteps": steps, "evaluation": {"everySteps": steps}},
        "quantization": {"computeType": "Float16"},
        "parallelism": {"zeroStage": stage},
        "checkpoint": {"everySteps": 1},
    }
    first = runner.config(**changes)
    assert runner.prepare(first) == ExitCode.DONE
    stopped = runner.kill_at(first, step=20)
    resumed = runner.train(runner.config(2, **changes))
    assert resumed.code == ExitCode.DONE, resumed.log[-3000:]
    assert min(resumed.losses) > 1
    assert resumed.message.compute_type == "Float16"
    last = [line for line in history_of(resumed) if "lossScale" in line][-1]
    shutil.rmtree(runner.folder / "checkpoints")
    shutil.rmtree(runner.folder / "out")
    undisturbed = runner.run(runner.config(3, **changes))
    assert undisturbed.code == ExitCode.DONE, undisturbed.log[-3000:]
    assert {**stopped.losses, **resumed.losses} == undisturbed.losses

    assert last["skippedSteps"] > 0
    assert last["lossScale"] == 2.0 ** (40 - last["skippedSteps"])
    assert undisturbed.losses[steps] < undisturbed.losses[1]


def test_an_explicit_bfloat16_on_a_cpu_without_it_is_obeyed_with_one_warning_of_its_cost(runner, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    config = runner.config(training={"epochs": None, "maxSteps": 1}, quantization={"computeType": "BFloat16"})
    process = runner.launch_anew(config)
    ended = runner.ended(config, process.wait())
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    assert ended.message.compute_type == "BFloat16"
    assert ended.log.count("this device emulates BFloat16: a matrix product takes") == 1
