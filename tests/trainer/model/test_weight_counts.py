"""Weights that are counted on the model itself are those that a rank holds."""

from __future__ import annotations

import json

import pytest
import torch

from composites import COMPOSITES
from mixtures import MIXTURES
from models.tiny_base import write_base
from qlora_api import QLoRAJobSpec
from qlora_api.spec import ComputeType, LoRASpec, QuantizationSpec
from qlora_memory import AdapterShape, counted_shape, planned_coverage
from qlora_memory.weights import constant_bytes, quantized_bytes, quantized_layers, unquantized_bytes
from qlora_trainer.model.base_model import add_lora, load_base, meta_model, weight_bytes
from qlora_trainer.model.coverage import coverage_of
from qlora_trainer.model.dry_run import find_layer_use
from qlora_trainer.model.layer_use import note_layer_use
from qlora_trainer.model.weight_counts import count_weights
from qlora_trainer.prepare.plan_memory import agreed_shape, shape_of
from tiny_models import CONFIGS

CPU = torch.device("cpu")
LORA = LoRASpec(rank=4)
HALF = QuantizationSpec(compute_type=ComputeType.BFLOAT16)
UNUSUAL = {
    "beam": "experts without a dense part, and a router's weight and bias that stay in fp32",
    "bigbird_pegasus": "a decoder of an encoder's class, and layers with biases",
    "ctrl": "no name of a layer that others use",
    "dbrx": "a module for each expert's weight",
    "mamba": "layers whose weights kernels read",
    "zaya": "experts and layers that share what they hold",
}
"""Model types whose tensors' names tell too little, and why."""


def spec_of(quantization):
    return QLoRAJobSpec.model_validate(
        {
            "model": {"source": "s3://models/base"},
            "dataset": {"train": {"source": "s3://rows/rows.jsonl"}, "format": "Text"},
            "quantization": quantization.model_dump(mode="json", by_alias=True),
            "lora": {"rank": LORA.rank},
            "training": {"maxSteps": 1},
            "output": {"destination": "s3://out/adapter"},
        }
    )


def counts_of(folder):
    skeleton = meta_model(folder, dtype=torch.bfloat16)
    note_layer_use(skeleton, find_layer_use(meta_model(folder)))
    return count_weights(skeleton)


def check_against_a_rank(folder, shape):
    layers, adapter = quantized_layers(shape, HALF), AdapterShape(shape, LORA)
    planned = {
        "quantizedWeights": sum(quantized_bytes(i, HALF) for i in layers),
        "quantizationConstants": sum(constant_bytes(i, HALF) for i in layers),
        "unquantizedWeights": unquantized_bytes(shape, HALF, adapter),
        "adapterWeights": adapter.bytes,
    }
    model = add_lora(load_base(folder, HALF, CPU), LORA, seed=1)
    assert planned == weight_bytes(model)
    found, counted = planned_coverage(shape, LORA, HALF), coverage_of(model)
    assert (found.adapted, found.quantized) == (counted.adapted, counted.quantized)


@pytest.mark.parametrize("name", [*CONFIGS, *MIXTURES, *COMPOSITES])
def test_counts_are_exact_and_agree_with_the_model_type(name, tiny_models, mixtures, composites):
    folder = {**tiny_models, **mixtures, **composites}[name]
    counts = counts_of(folder)
    check_against_a_rank(folder, counted_shape(json.loads((folder / "config.json").read_bytes()), counts))
    shape = shape_of(folder)
    assert shape is not None
    assert agreed_shape(folder, shape, counts, spec_of(HALF)).modelled == shape.modelled


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_type_whose_names_tell_too_little_is_planned_as_counted(name, tmp_path):
    write_base(name, tmp_path)
    shape = agreed_shape(tmp_path, shape_of(tmp_path), counts_of(tmp_path), spec_of(HALF))
    assert shape.counted
    check_against_a_rank(tmp_path, shape)


def test_a_known_type_whose_model_differs_is_planned_as_counted(tiny_models, tmp_path, caplog):
    folder = tiny_models["llama"]
    config = json.loads((folder / "config.json").read_bytes())
    wider = {**config, "intermediate_size": 2 * config["intermediate_size"]}
    (tmp_path / "config.json").write_text(json.dumps(wider))
    shape = agreed_shape(folder, shape_of(folder), counts_of(tmp_path), spec_of(HALF))
    assert shape.counted
    assert "as counted on the model; its model type tells" in caplog.text
