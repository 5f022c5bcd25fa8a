"""Mixtures of experts, from Prepare to the published adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mixtures import MIXTURES, save_mixture
from qlora_api.contract import ExitCode
from qlora_trainer.reporting.training_history import PUBLISHED_FILE

pytestmark = pytest.mark.ranks

CASES = {
    "qwen3_moe": pytest.param("qwen3_moe", {"rank": 8}, 2, {}, id="merged"),
    "deepseek_v3": pytest.param("deepseek_v3", {"rank": 8}, 1, {"zeroStage": 2}, id="names-that-peft-changes"),
    "mixtral": pytest.param("mixtral", {"rank": 500}, 2, {"zeroStage": 3}, id="factors-that-zero-3-divides"),
    "gpt_oss": pytest.param("gpt_oss", {"rank": 8}, 2, {"zeroStage": 2}, id="rows-by-themselves"),
    "llama4_text": pytest.param("llama4_text", {"rank": 8}, 1, {}, id="no-interface"),
}


@pytest.mark.parametrize(("name", "lora", "ranks", "parallelism"), CASES.values())
def test_a_mixture_is_trained_and_published(name, lora, ranks, parallelism, runner):
    base = runner.folder / name
    save_mixture(base, name, **{**MIXTURES[name], "vocab_size": 512})
    AutoTokenizer.from_pretrained(runner.model).save_pretrained(base)
    ended = runner.run(
        runner.config(
            ranks=ranks,
            model={"source": str(base)},
            lora=lora,
            parallelism=parallelism,
            quantization={"computeType": "BFloat16"},
            training={"epochs": None, "maxSteps": 3, "learningRate": "5e-3", "gradientCheckpointing": "Full"},
            output={"destination": str(runner.folder / "out"), "merge": "BFloat16", "allowWorseEval": True},
        )
    )
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    assert "the experts of" in ended.log
    assert ("each row is computed by itself" in ended.log) == (name == "gpt_oss")
    adapter = Path(ended.message.adapter.uri)
    experts = {n: t for n, t in load_file(adapter / "adapter_model.safetensors").items() if ".experts." in n}
    assert all(tensor.any() for tensor in experts.values())
    assert len([n for n in experts if "lora_B" in n]) == 2 * (1 if name == "deepseek_v3" else 2)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == lora["rank"]
    receipt = json.loads((adapter / PUBLISHED_FILE).read_text().splitlines()[-1])["receipt"]
    assert [note.partition(":")[0] for note in receipt["notes"]] == ["quantized", "adapted"]
    assert "does not serve this adapter by itself, since it adapts experts" in (adapter / "README.md").read_text()


def test_zero_3_makes_the_adapter_that_is_made_without(runner):
    """In fp32, where the experts' factors are used as they are, and large enough to be divided among the ranks."""
    base = runner.folder / "mixtral"
    save_mixture(base, "mixtral", **{**MIXTURES["mixtral"], "vocab_size": 512})
    AutoTokenizer.from_pretrained(runner.model).save_pretrained(base)
    found = []
    for stage in (0, 3):
        config = runner.config(
            uid=f"0a1b2c3{stage}-run",
            model={"source": str(base)},
            lora={"rank": 500},
            parallelism={"zeroStage": stage},
            quantization={"computeType": "Float32"},
            dataset={"eval": None},
            training={"epochs": None, "maxSteps": 2, "learningRate": "1e-3", "optimizer": "AdamW"},
            output={"destination": str(runner.folder / f"out-{stage}")},
        )
        ended = runner.run(config.model_copy(update={"checkpoint_uri": str(runner.folder / f"checkpoints-{stage}")}))
        assert ended.code == ExitCode.DONE, ended.log[-3000:]
        found.append(load_file(Path(ended.message.adapter.uri) / "adapter_model.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=2e-5)  # a step is 1e-3
