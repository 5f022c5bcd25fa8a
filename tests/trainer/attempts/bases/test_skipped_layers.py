"""Jobs that leave layers in 16 bits, from Prepare to the published and merged adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtures import MIXTURES, save_mixture
from qlora_api.contract import ExitCode
from qlora_trainer.publish.publisher import verify_published

pytestmark = pytest.mark.ranks

SKIPPED = ["layers.0.*.down_proj", "layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("stage", "kind"), [(3, "NF4"), (2, "FP4"), (1, "INT8")], ids=["zero-3-nf4", "zero-2-fp4", "zero-1-int8"]
)
def test_a_base_with_layers_in_16_bits_is_trained_published_and_merged(stage, kind, runner):
    ended = runner.run(
        runner.config(
            parallelism={"zeroStage": stage},
            quantization={"type": kind, "skipModules": SKIPPED},
            training={"epochs": None, "maxSteps": 6},
            output={"merge": "BFloat16", "allowWorseEval": True},
        )
    )
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    assert verify_published(ended.message.adapter.manifest_uri) == []
    folder = Path(ended.message.adapter.uri)
    assert f"but for {', '.join(SKIPPED)}" in (folder / "README.md").read_text()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runner.model), folder)
    merged = AutoModelForCausalLM.from_pretrained(folder.parent / "merged")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, merged(ids).logits, atol=0.1)


def test_a_mixture_with_experts_in_16_bits_is_trained_and_merged(runner):
    base = runner.folder / "base"
    save_mixture(base, "qwen3_moe", **{**MIXTURES["qwen3_moe"], "vocab_size": 512})
    AutoTokenizer.from_pretrained(runner.model).save_pretrained(base)
    ended = runner.run(
        runner.config(
            model={"source": str(base)},
            parallelism={"zeroStage": 2},
            quantization={"skipModules": ["layers.0.mlp.experts.down_proj"]},
            training={"epochs": None, "maxSteps": 3},
            output={"merge": "BFloat16", "allowWorseEval": True},
        )
    )
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    assert verify_published(ended.message.adapter.manifest_uri) == []


def test_a_run_that_was_stopped_goes_on_with_the_same_layers_in_16_bits(runner):
    changes = {
        "quantization": {"skipModules": SKIPPED},
        "training": {"epochs": None, "maxSteps": 8},
        "checkpoint": {"everySteps": 3},
    }
    assert runner.prepare(runner.config(**changes)) == 0
    first = runner.kill_at(runner.config(**changes), step=5)
    second = runner.run(runner.config(attempt=2, **changes))
    assert second.code == ExitCode.DONE, second.log[-3000:]
    assert min(second.losses) == 4
    shutil.rmtree(runner.folder / "checkpoints")
    shutil.rmtree(runner.folder / "out")
    whole = runner.run(runner.config(attempt=3, **changes))
    assert {**first.losses, **second.losses} == pytest.approx(whole.losses, rel=1e-4)
