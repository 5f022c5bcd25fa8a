"""Runs whose merged model, or whose loss, is out of the ordinary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_api.contract import ExitCode

pytestmark = pytest.mark.ranks


def base_with(runner, change, **config):
    """A copy of the base with other weights and configuration."""
    folder = shutil.copytree(runner.model, runner.folder / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return {"source": str(folder)}


def test_a_tied_head_that_is_adapted_is_untied_in_the_merged_model(runner):
    base = base_with(runner, lambda t: t.pop("lm_head.weight"), tie_word_embeddings=True)
    config = runner.config(
        ranks=1,
        model=base,
        lora={"targetModules": ["q_proj", "lm_head"]},
        training={"epochs": None, "maxSteps": 3, "learningRate": "2e-2"},
        output={"destination": str(runner.folder / "out"), "merge": "BFloat16", "allowWorseEval": True},
    )
    ended = runner.run(config)
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    merged = Path(ended.message.adapter.uri).parent / "merged"
    assert not json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
    tensors, before = load_file(merged / "model.safetensors"), load_file(Path(base["source"]) / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_an_evaluation_loss_of_any_size_is_one(runner):
    def louder(tensors):
        tensors["lm_head.weight"] *= 2.0**18

    ended = runner.run(
        runner.config(
            ranks=1,
            model=base_with(runner, louder),
            training={"epochs": None, "maxSteps": 1, "learningRate": "1e-6"},
            output={"destination": str(runner.folder / "out"), "allowWorseEval": True},
        )
    )
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    assert float(ended.message.progress.best_eval_loss) > 709
    assert "perplexity inf" in ended.log
    assert "nan" not in (runner.folder / "out" / "manifest.json").read_text().lower()


def test_an_adapter_that_was_refused_is_published_once_it_may_be_worse(runner):
    rows = runner.folder / "other.jsonl"  # unlike the rows that it is compared on
    rows.write_text("".join(json.dumps({"prompt": "z", "completion": "zqx" * (n + 2)}) + "\n" for n in range(16)))
    changes = {
        "dataset": {"train": {"source": str(rows)}, "eval": {"source": str(runner.rows)}},
        "training": {"epochs": None, "maxSteps": 6, "learningRate": "2e-1", "evaluation": {"everySteps": 6}},
    }
    first = runner.run(runner.config(ranks=1, **changes))
    assert first.code == ExitCode.ADAPTER_REJECTED, first.log[-2000:]
    assert "spec.output.allowWorseEval" in first.text
    output = {"destination": str(runner.folder / "elsewhere"), "allowWorseEval": True}
    again = runner.run(runner.config(ranks=1, attempt=2, output=output, **changes))
    assert again.code == ExitCode.DONE, again.log[-2000:]
    assert not again.losses, "nothing is trained again"
    assert (runner.folder / "elsewhere" / "manifest.json").exists()
