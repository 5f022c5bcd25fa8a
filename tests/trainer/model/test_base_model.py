"""The quantized base and the adapter on it."""

from __future__ import annotations

import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from mixtures import save_mixture
from models.tiny_base import write_base
from qlora_api.spec import ComputeType, LoRABias, LoRASpec, QuantizationSpec, QuantizationType
from qlora_memory import planned_coverage
from qlora_trainer.errors import UserError
from qlora_trainer.model.base_model import (
    add_lora,
    load_base,
    meta_model,
    trainable,
    weight_bytes,
)
from qlora_trainer.model.coverage import coverage_of
from qlora_trainer.model.experts.structure import router_names
from qlora_trainer.model.experts.targets import check_targets, linear_layers
from qlora_trainer.model.loss import NextTokenLoss, call_arguments, end_to_end, head_is_plain
from qlora_trainer.prepare.plan_memory import shape_of
from qlora_trainer.storage.model_files import check_code
from random_rows import random_rows

CPU = torch.device("cpu")
BFLOAT16 = QuantizationSpec(compute_type=ComputeType.BFLOAT16)
ADAPTABLE = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
}


def loss_of(model, rows=(24, 9)):
    module = NextTokenLoss(model, fused=head_is_plain(model))
    return module(*call_arguments(end_to_end(random_rows(*rows)), CPU)).mean()


@pytest.mark.parametrize(
    ("quantization", "layer"),
    [
        pytest.param(QuantizationSpec(), bnb.nn.Linear4bit, id="NF4-double"),
        pytest.param(QuantizationSpec(double_quantization=False), bnb.nn.Linear4bit, id="NF4"),
        pytest.param(QuantizationSpec(type=QuantizationType.FP4), bnb.nn.Linear4bit, id="FP4-double"),
        pytest.param(QuantizationSpec(type=QuantizationType.INT8), bnb.nn.Linear8bitLt, id="INT8"),
        pytest.param(QuantizationSpec(type=QuantizationType.NONE), torch.nn.Linear, id="16-bit"),
        pytest.param(QuantizationSpec(compute_type=ComputeType.FLOAT32), bnb.nn.Linear4bit, id="NF4-fp32-compute"),
    ],
)
def test_every_quantization_loads_learns_and_stays_frozen(quantization, layer, tiny_models):
    model = add_lora(load_base(tiny_models["llama"], quantization, CPU), LoRASpec(), seed=1)
    assert type(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer) is layer
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    first = loss_of(model)
    for _ in range(5):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model) < first
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("kind", [kind for kind in QuantizationType if kind is not QuantizationType.NONE])
def test_linear_layers_of_a_class_of_their_own_are_quantized_as_planned(kind, tmp_path):
    save_mixture(tmp_path, "falcon", vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    quantization = QuantizationSpec(type=kind, compute_type=ComputeType.BFLOAT16)
    model = add_lora(load_base(tmp_path, quantization, CPU), LoRASpec(), seed=1)
    assert coverage_of(model) == planned_coverage(shape_of(tmp_path), LoRASpec(), quantization)


@pytest.mark.parametrize("kind", [QuantizationType.NF4, QuantizationType.INT8])
@pytest.mark.parametrize("model_type", ["afmoe", "jetmoe", "longcat_flash"])
def test_routers_stay_as_they_are(model_type, kind, tmp_path):
    write_base(model_type, tmp_path)
    model = load_base(tmp_path, QuantizationSpec(type=kind, compute_type=ComputeType.BFLOAT16), CPU)
    routers = [model.get_submodule(name) for name in router_names(model)]
    assert routers
    assert {type(router) for router in routers} == {torch.nn.Linear}


def test_only_the_adapter_is_fp32(tiny_models):
    model = add_lora(load_base(tiny_models["llama"], BFLOAT16, CPU), LoRASpec(), seed=1)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16, torch.uint8}


def test_an_eval_forward_does_not_repack_the_weights_or_stop_gradients(tiny_models):
    """bitsandbytes 0.50 on a CPU with avx512_bf16 otherwise swaps in a kernel without a backward."""
    model = add_lora(load_base(tiny_models["llama"], QuantizationSpec(), CPU), LoRASpec(), seed=1)

    def gradients():
        for parameter in trainable(model).values():
            parameter.grad = None
        model.train()
        loss_of(model).backward()
        return {n: p.grad.clone() for n, p in trainable(model).items()}

    before = gradients()
    with torch.no_grad():
        loss_of(model.eval())
    after = gradients()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("name", ADAPTABLE)
def test_all_linear_layers_but_the_head_are_adapted_by_default(name, tiny_models):
    model = add_lora(load_base(tiny_models[name], QuantizationSpec(), CPU), LoRASpec(), seed=1)
    adapted = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n in trainable(model) if ".lora_A." in n}
    assert adapted == ADAPTABLE[name]


def test_an_unknown_target_is_refused_with_those_that_exist(tiny_models):
    skeleton = meta_model(tiny_models["opt"])
    with pytest.raises(UserError) as caught:
        check_targets(skeleton, LoRASpec(target_modules=["q_proj", "q_prj"]), "opt-tiny")
    assert str(caught.value) == (
        'spec.lora.targetModules: "q_prj" matches no linear layer of opt-tiny; '
        "its linear layers are fc1, fc2, k_proj, lm_head, out_proj, q_proj, v_proj"
    )


def test_code_of_its_own_is_not_needed_where_transformers_has_the_class(tiny_models, tmp_path):
    """Many bases of the Hub still name the code they once needed."""
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    check_code("config.json", (folder / "config.json").read_bytes())
    assert type(meta_model(folder)) is LlamaForCausalLM
    assert type(load_base(folder, QuantizationSpec(), CPU)) is LlamaForCausalLM
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "x", "auto_map": code}))
    with pytest.raises(UserError, match=r"brings its own code .*modeling_x\.X"):
        meta_model(folder)


def test_a_skeleton_without_weights_has_the_layers_of_the_loaded_model(tiny_models):
    loaded = load_base(tiny_models["llama"], QuantizationSpec(), CPU)
    assert list(linear_layers(meta_model(tiny_models["llama"]))) == list(linear_layers(loaded))


@pytest.mark.parametrize(
    ("lora", "learns"),
    [
        pytest.param(LoRASpec(bias=LoRABias.ALL), "layer_norm.bias", id="all-biases"),
        pytest.param(LoRASpec(bias=LoRABias.LORA_ONLY), "q_proj.base_layer.bias", id="biases-of-adapted-layers"),
        pytest.param(LoRASpec(dora=True), "lora_magnitude_vector", id="dora"),
        pytest.param(LoRASpec(rank_stabilized=True, dropout="0.1"), "lora_A", id="rank-stabilized-with-dropout"),
    ],
)
def test_what_learns_besides_a_and_b_is_fp32_and_moves(lora, learns, tiny_models):
    model = add_lora(load_base(tiny_models["opt"], QuantizationSpec(), CPU), lora, seed=1)
    chosen = {n: p for n, p in trainable(model).items() if learns in n}
    before = {n: p.detach().clone() for n, p in chosen.items()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    for _ in range(2):  # in the first step B is zero, and A has no gradient
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert chosen
    assert all(p.dtype is torch.float32 for p in chosen.values())
    moved = [n for n, p in chosen.items() if not torch.equal(before[n], p)]
    assert len(moved) > len(chosen) // 2


def test_rank_stabilization_scales_by_the_root_of_the_rank(tiny_models):
    model = add_lora(
        load_base(tiny_models["llama"], QuantizationSpec(), CPU), LoRASpec(rank=16, alpha=32, rank_stabilized=True), 1
    )
    assert model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] == 32 / 4


def test_the_seed_decides_the_initial_adapter(tiny_models):
    def first(seed):
        return next(
            iter(
                trainable(add_lora(load_base(tiny_models["llama"], QuantizationSpec(), CPU), LoRASpec(), seed)).values()
            )
        )

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.fixture(scope="module")
def four_bit_on_disk(tiny_models, tmp_path_factory):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    folder = tmp_path_factory.mktemp("nf4")
    AutoModelForCausalLM.from_pretrained(
        tiny_models["llama"], quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    ).save_pretrained(folder)
    return folder


def test_a_base_that_is_4_bit_on_disk_is_loaded_bit_for_bit(four_bit_on_disk, tiny_models):
    stored = load_base(four_bit_on_disk, QuantizationSpec(), CPU).model.layers[1].mlp.up_proj.weight
    fresh = load_base(tiny_models["llama"], QuantizationSpec(), CPU).model.layers[1].mlp.up_proj.weight
    assert torch.equal(stored.data, fresh.data)
    assert torch.equal(stored.quant_state.absmax, fresh.quant_state.absmax)


@pytest.mark.parametrize(
    ("quantization", "field", "remedy"),
    [
        pytest.param(
            QuantizationSpec(type=QuantizationType.FP4), "spec.quantization.type", "set NF4", id="another-type"
        ),
        pytest.param(
            QuantizationSpec(double_quantization=False),
            "spec.quantization.doubleQuantization",
            "set true",
            id="double-quantized-on-disk",
        ),
    ],
)
def test_a_base_quantized_otherwise_than_the_manifest_says_is_refused(quantization, field, remedy, four_bit_on_disk):
    with pytest.raises(UserError, match=remedy) as caught:
        load_base(four_bit_on_disk, quantization, CPU)
    assert caught.value.error.field == field


def test_a_model_that_is_no_causal_language_model_is_refused(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "vision")
    (folder / "config.json").write_text('{"model_type": "vit", "hidden_size": 32}')
    with pytest.raises(UserError, match="no causal language model"):
        load_base(folder, QuantizationSpec(), CPU)


def test_weight_bytes_are_those_of_the_tensors(tiny_models):
    model = add_lora(load_base(tiny_models["llama"], BFLOAT16, CPU), LoRASpec(rank=8, target_modules=["q_proj"]), 1)
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 128 * 64
    sizes = weight_bytes(model)
    assert sizes["quantizedWeights"] == 2 * layer // 2
    assert sizes["adapterWeights"] == 2 * 4 * (8 * 64 + 64 * 8)
    assert sizes["unquantizedWeights"] == 2 * (2 * 320 * 64 + 5 * 64)  # embedding, head, five norms
    blocks = 2 * layer // 64
    assert blocks <= sizes["quantizationConstants"] <= blocks + 14 * (2 * 16 * 4 + 2 * 256 * 4)
