"""Small models and adapters with nothing but files."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from qlora_api.contract import JobRef
from qlora_api.spec import QLoRAJobSpec
from qlora_storage.object_store import open_store
from qlora_trainer.publish.adapter_manifest import PublishFacts

torch.set_num_threads(1)

UID = "3f2a9c01-5d7e-4a53-9f2f-8a1f6f1f0001"
BASE_LAYERS = tuple(f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj"))


def edit_json(path, **changes):
    """Change top-level keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def upload(folder, uri):
    """Upload every file of a folder; return the URI."""
    store = open_store(uri, "x")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        store.put(path.relative_to(folder).as_posix(), path)
    return uri


def names(folder):
    """Return the paths of a folder's files within it."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def make_model():
    """Writes a model's folder: config, tokenizer and one or two weight files of a few hundred bytes."""

    def make(folder, shards=1, width=8):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": width}))
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        (folder / "tokenizer_config.json").write_text("{}")
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        if shards == 1:
            names = ["model.safetensors"]
        else:
            index = {"weight_map": {f"layer.{i}": name for i, name in enumerate(names)}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for i, name in enumerate(names):
            save_arrays({f"layer.{i}": np.full((width, width), i + 1, np.float32)}, folder / name)
        return folder

    return make


@pytest.fixture
def make_adapter():
    """Writes ``<folder>/adapter`` as PEFT does, trained on the layers of BASE_LAYERS."""

    def make(folder, rank=4, width=8, **changes):
        """``changes``: tensor name → tensor, or None to leave it out."""
        target = folder / "adapter"
        target.mkdir(parents=True)
        tensors = {}
        for layer in BASE_LAYERS:
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, width)
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(width, rank)
        tensors = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
        save_file(tensors, target / "adapter_model.safetensors")
        config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], base_model_name_or_path="org/base")
        config.save_pretrained(target)
        (target / "tokenizer.json").write_text("{}")
        return folder

    return make


@pytest.fixture
def job():
    return JobRef(name="tune", namespace="team", uid=UID)


@pytest.fixture
def make_facts():
    """Return the facts of a finished run, with changes to the spec's groups."""

    def make(base_eval_loss=2.5, eval_loss=1.25, **groups):
        spec = QLoRAJobSpec.model_validate(
            {
                "model": {"source": "hf://org/base@main"},
                "dataset": {"train": {"source": "s3://rows/train.jsonl"}, "format": "Messages"},
                "training": {"maxSteps": 100},
                "output": {"destination": "s3://adapters/tune"},
                **groups,
            }
        )
        return PublishFacts(
            spec=spec,
            base_revision="c" * 40,
            step=90,
            total_steps=100,
            tokens=123_456,
            base_eval_loss=base_eval_loss,
            eval_loss=eval_loss,
        )

    return make
