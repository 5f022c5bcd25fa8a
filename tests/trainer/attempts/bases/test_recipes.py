"""The example for OPT-6.7B on film reviews, as it stands, at toy width: the same architecture, fields and batch."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from qlora_api import QLoRAJob
from qlora_api.batch import split_batch
from qlora_api.contract import ExitCode

RECIPE = Path(__file__).parents[4] / "examples" / "opt-6.7b-imdb.yaml"


@pytest.fixture
def recipe(runner):
    """The example with the three places changed that name things of a cluster, and its steps cut to the toy's nine."""
    manifest = yaml.safe_load(RECIPE.read_text())
    spec = manifest["spec"]
    model = runner.folder / "opt"
    tokenizer = AutoTokenizer.from_pretrained(runner.model)
    tokenizer.save_pretrained(model)
    torch.manual_seed(0)
    shape = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    OPTForCausalLM(shape).bfloat16().save_pretrained(model)
    reviews = [json.loads(line) for line in runner.rows.read_text().splitlines()]
    texts = [" ".join(r["completion"] for r in reviews[n : n + 40]) for n in range(0, 150, 2)]
    pq.write_table(pa.table({"text": texts, "label": [0] * len(texts)}), runner.folder / "reviews.parquet")
    spec["model"] = {"source": str(model)}
    spec["dataset"]["train"] = {"source": str(runner.folder / "reviews.parquet")}
    spec["quantization"]["computeType"] = "Auto"  # no CPU has arithmetic in float16
    spec["output"] = {"destination": str(runner.folder / "out")}
    spec["training"]["evaluation"]["everySteps"] = spec["checkpoint"]["everySteps"] = 2
    spec["training"]["warmupSteps"] = 2
    return QLoRAJob.from_manifest(manifest).spec


@pytest.mark.ranks
def test_the_classic_recipe_runs_on_the_opt_architecture(runner, recipe):
    config = runner.config().model_copy(
        update={"spec": recipe, "batch": split_batch(recipe, 2), "gradient_checkpointing": True}
    )
    assert (config.batch.micro_batch_size, config.batch.gradient_accumulation_steps) == (4, 4)
    ended = runner.run(config)
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    manifest = json.loads((runner.folder / "out" / "manifest.json").read_text())
    assert manifest["metrics"]["evalLoss"] < manifest["metrics"]["baseEvalLoss"]
    adapter = Path(ended.message.adapter.uri)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (8, 32, 0.05)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors.keys()}  # noqa: SIM118 no mapping
    assert layers == {"q_proj", "v_proj"}
    checkpoints = {p.name for p in (runner.folder / "checkpoints").iterdir()}
    assert 3 <= len(checkpoints) <= 4  # the newest three, and the best where it is older
