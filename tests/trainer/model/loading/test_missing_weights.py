"""Weights that a base's files lack are found by their names and shapes, before anything is loaded."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from composites import COMPOSITES
from mixtures import MIXTURES
from qlora_trainer.model.base_model import causal_config
from qlora_trainer.model.loading.missing_weights import missing_matrices
from tiny_models import CONFIGS

QUERY, NORM = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("name", [*CONFIGS, *MIXTURES, *COMPOSITES])
def test_a_base_as_it_was_saved_lacks_nothing(name, tiny_models, mixtures, composites):
    folder = {**tiny_models, **mixtures, **composites}[name]
    assert missing_matrices(folder, causal_config(folder)) == []


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        pytest.param({QUERY: None}, [QUERY], id="a-matrix"),
        pytest.param({QUERY: torch.zeros(3, 5)}, [QUERY], id="a-matrix-of-another-shape"),
        pytest.param({NORM: None}, [], id="a-vector"),
        pytest.param({"more.weight": torch.zeros(2, 2)}, [], id="a-weight-too-many"),
    ],
)
def test_what_a_file_lacks_is_named(change, missing, tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["qwen3"], tmp_path / "base")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    assert missing_matrices(folder, causal_config(folder)) == missing
