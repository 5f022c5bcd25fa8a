"""Bases that also take images, from Prepare to the published adapter and the merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from composites import save_composite
from qlora_api.contract import ExitCode

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl_moe"])
def test_a_base_with_a_tower_is_trained_and_published(name, runner):
    base = runner.folder / name
    save_composite(base, name, vocab_size=512)
    AutoTokenizer.from_pretrained(runner.model).save_pretrained(base)
    ended = runner.run(
        runner.config(
            ranks=2,
            model={"source": str(base)},
            lora={"rank": 8},
            quantization={"computeType": "BFloat16"},
            training={"epochs": None, "maxSteps": 2, "learningRate": "5e-3"},
            output={"destination": str(runner.folder / "out"), "merge": "BFloat16", "allowWorseEval": True},
        )
    )
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    adapter = Path(ended.message.adapter.uri)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(n.startswith("base_model.model.model.language_model.layers.") for n in tensors)
    merged = adapter.with_name("merged")
    index = json.loads((merged / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert index.keys() == load_file(base / "model.safetensors").keys()
    assert (merged / "preprocessor_config.json").is_file()
