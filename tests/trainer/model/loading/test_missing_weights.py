"""Weights that a base's files lack are found by their names and shapes, before anything is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from composites import COMPOSITES
from mixtures import MIXTURES
from qlora_memory.shape.safetensors_headers import LENGTH_BYTES
from qlora_trainer.bounds import Bounds, bounded
from qlora_trainer.model.base_model import causal_config
from qlora_trainer.model.loading.missing_weights import missing_matrices
from tiny_models import CONFIGS

LARGE = 16 << 30
"""Bytes, twice the most that a stage of Prepare may have."""
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


def test_a_base_that_is_larger_than_memory_is_looked_through_within_bounds(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["qwen3"], tmp_path / "base")
    (file,) = folder.glob("*.safetensors")
    size = file.stat().st_size
    with file.open("r+b") as weights:
        length = int.from_bytes(weights.read(LENGTH_BYTES), "little")
        header, rest = json.loads(weights.read(length)), weights.read()
        start = size - LENGTH_BYTES - length
        header["more.weight"] = {"dtype": "U8", "shape": [LARGE], "data_offsets": [start, start + LARGE]}
        text = json.dumps(header).encode()
        weights.seek(0)
        weights.write(len(text).to_bytes(LENGTH_BYTES, "little") + text + rest)
        weights.truncate(LENGTH_BYTES + len(text) + start + LARGE)  # of which nothing is on the disk
    with bounded(Bounds(memory_bytes=LARGE // 4)):
        assert missing_matrices(folder, causal_config(folder)) == []
