"""``spec.quantization.skipModules``: layers and experts that stay in 16 bits, loaded, trained and counted."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from mixtures import MIXTURES
from qlora_api.spec import ComputeType, LoRASpec, Optimizer, ParallelismSpec, QuantizationSpec, QuantizationType
from qlora_memory import EstimateInput, estimate, planned_coverage
from qlora_trainer.model import base_model
from qlora_trainer.model.base_model import add_lora, load_base, weight_bytes
from qlora_trainer.model.coverage import coverage_of
from qlora_trainer.model.experts.packed import FrozenExperts
from qlora_trainer.model.experts.structure import expert_parameters
from qlora_trainer.model.experts.targets import linear_layers
from qlora_trainer.prepare.plan_memory import shape_of
from training_steps import without_gradient

CPU = torch.device("cpu")
LORA = LoRASpec(rank=4)
PLAIN = QuantizationSpec(type=QuantizationType.NONE, compute_type=ComputeType.BFLOAT16)
KINDS = pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (QuantizationType.NF4, bnb.nn.Linear4bit),
        (QuantizationType.FP4, bnb.nn.Linear4bit),
        (QuantizationType.INT8, bnb.nn.Linear8bitLt),
    ],
)
PATTERNS = {
    "llama": ["down_proj", "model.layers.1.self_attn.q_proj", "layers.0.*.gate_*"],
    "opt": ["fc2", "model.decoder.layers.1.self_attn.q_proj", "layers.0.*.k_*"],
    "phi": ["fc2", "model.layers.1.self_attn.q_proj", "layers.0.*.dense"],
}
SKIPPED = {
    "llama": {"mlp.down_proj", "1.self_attn.q_proj", "0.mlp.gate_proj"},
    "opt": {"fc2", "1.self_attn.q_proj", "0.self_attn.k_proj"},
    "phi": {"mlp.fc2", "1.self_attn.q_proj", "0.self_attn.dense"},
}


def skipping(patterns, kind=QuantizationType.NF4):
    return QuantizationSpec(type=kind, compute_type=ComputeType.BFLOAT16, skip_modules=patterns)


def test_a_base_is_built_without_weights_once_for_all_that_loading_asks(monkeypatch, tiny_models):
    build, built = base_model.meta_model_of, []
    monkeypatch.setattr(base_model, "meta_model_of", lambda *a, **named: built.append(build(*a, **named)) or built[-1])
    load_base(tiny_models["llama"], skipping(["down_proj"]), CPU)
    assert len(built) == 1


def planned_bytes(folder, quantization):
    run = EstimateInput(
        shape=shape_of(folder),
        lora=LORA,
        quantization=quantization,
        optimizer=Optimizer.ADAMW,
        parallelism=ParallelismSpec(),
        world_size=1,
        rows=(32,),
        checkpointing=False,
        cuda=False,
    )
    return estimate(run).as_status()


@KINDS
@pytest.mark.parametrize("name", PATTERNS)
def test_named_layers_stay_in_16_bits_and_all_others_are_quantized(name, kind, layer, tiny_models):
    model = load_base(tiny_models[name], skipping(PATTERNS[name], kind), CPU)
    plain = linear_layers(load_base(tiny_models[name], PLAIN, CPU))
    for full, module in linear_layers(model).items():
        if any(full.endswith(end) for end in SKIPPED[name]):
            assert type(module) is torch.nn.Linear, full
            assert torch.equal(module.weight, plain[full].weight)
        else:
            assert type(module) is layer, full
    assert type(model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("kind", [QuantizationType.NF4, QuantizationType.FP4, QuantizationType.INT8])
@pytest.mark.parametrize("name", PATTERNS)
def test_they_are_adapted_counted_and_planned(name, kind, tiny_models):
    quantization = skipping(PATTERNS[name], kind)
    base = load_base(tiny_models[name], quantization, CPU)
    model = add_lora(base, LORA, seed=1)
    assert coverage_of(model) == planned_coverage(shape_of(tiny_models[name]), LORA, quantization)
    planned = planned_bytes(tiny_models[name], quantization)
    found = weight_bytes(model)
    if kind is QuantizationType.INT8:  # on a CPU its constants are not the parameter's own
        found["quantizationConstants"] = planned["quantizationConstants"]
    assert {k: planned[k] for k in found} == found
    assert without_gradient(model) == []


@pytest.mark.parametrize("name", MIXTURES)
def test_named_experts_stay_in_16_bits_and_learn(name, mixtures):
    plain = expert_parameters(load_base(mixtures[name], PLAIN, CPU))
    skipped, *others = plain
    pattern = f"layers.{skipped.split('.')[2]}.*.{skipped.rpartition('.')[2]}"  # older names on disk have other middles
    quantization = skipping([pattern])
    base = load_base(mixtures[name], quantization, CPU)
    experts = expert_parameters(base)
    assert not hasattr(experts[skipped], "quant_state")
    assert torch.equal(experts[skipped], plain[skipped])
    assert all(hasattr(experts[other], "quant_state") for other in others)
    assert FrozenExperts(experts[skipped]).shape == FrozenExperts(plain[skipped]).shape
    model = add_lora(base, LORA, seed=1)
    assert coverage_of(model).quantized == planned_coverage(shape_of(mixtures[name]), LORA, quantization).quantized
    assert without_gradient(model) == []
    planned, found = planned_bytes(mixtures[name], quantization), weight_bytes(model)
    held = ("quantizedWeights", "quantizationConstants")
    assert {k: planned[k] for k in held} == {k: found[k] for k in held}
