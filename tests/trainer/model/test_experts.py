"""Mixtures of experts: packed in 4 bits as they are loaded, adapted, published in PEFT's layout."""

from __future__ import annotations

import json
import weakref

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mixtures import MIXTURES, SHAPE, save_mixture
from qlora_api.spec import ComputeType, LoRASpec, QuantizationSpec, QuantizationType
from qlora_memory import model_shape, planned_coverage, tensor_infos
from qlora_trainer.errors import AdapterRejectedError, UserError
from qlora_trainer.model.base_model import add_lora, load_base, meta_model, trainable, weight_bytes
from qlora_trainer.model.coverage import coverage_of
from qlora_trainer.model.experts.packed import Format, FrozenExperts, Packer
from qlora_trainer.model.experts.structure import expert_parameters, router_names
from qlora_trainer.model.experts.targets import check_targets, linear_layers
from qlora_trainer.model.loading import hf_quantizers
from qlora_trainer.model.loss import call_arguments, end_to_end
from qlora_trainer.publish.gate import verify_adapter, verify_loads
from qlora_trainer.publish.merge_adapter import merge
from qlora_trainer.storage.model_files import safetensors_header
from qlora_trainer.training.finish import export_adapter
from random_rows import random_rows
from training_steps import distance, module_of, steps, without_gradient

CPU = torch.device("cpu")
NF4 = QuantizationSpec(compute_type=ComputeType.FLOAT32)
PLAIN = QuantizationSpec(type=QuantizationType.NONE, compute_type=ComputeType.FLOAT32)
LORA = LoRASpec(rank=4, alpha=8)
TYPES = pytest.mark.parametrize("name", MIXTURES)


def probabilities(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(30).view(1, -1) * 7 % 320, use_cache=False).logits.float().softmax(-1)


def trained(folder, out):
    """Return the probabilities of a trained model on an unquantized base; its adapter is exported to ``out``."""
    model = add_lora(load_base(folder, PLAIN, CPU), LORA, seed=1)
    steps(model, 2)
    export_adapter(model, {n: p.detach().clone() for n, p in trainable(model).items()}, out, str(folder), "main")
    (out / "tokenizer.json").write_text("{}")
    return probabilities(model)


@TYPES
def test_two_steps_reach_every_adapter_on_packed_experts(name, mixtures):
    base = load_base(mixtures[name], NF4, CPU)
    experts = expert_parameters(base)
    assert experts
    assert all(hasattr(parameter, "quant_state") for parameter in experts.values())
    model = add_lora(base, LORA, seed=1)
    targeted = model.targeted_parameter_names
    assert {n.removeprefix("base_model.model.") for n in experts} <= set(targeted)
    assert without_gradient(model) == []
    assert not any(name in n for name in ("router", ".gate.") for n in trainable(model))


@TYPES
def test_peft_alone_gives_the_trained_model_and_so_does_a_merge(name, mixtures, tmp_path):
    own = trained(mixtures[name], tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(mixtures[name], dtype=torch.float32)
    untrained = probabilities(plain)
    assert distance(own, untrained) > 0.05
    assert distance(probabilities(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()), own) < 1e-4
    merge(mixtures[name], tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert distance(probabilities(merged.eval()), own) < 0.02  # rounded to bf16


@TYPES
def test_the_gate_takes_the_adapter_and_misses_a_part_of_it(name, mixtures, tmp_path):
    trained(mixtures[name], tmp_path)
    skeleton = meta_model(mixtures[name])
    names = [n for found in (skeleton.named_modules(), skeleton.named_parameters()) for n, _ in found]
    verify_adapter(tmp_path, names, LORA)
    verify_loads(tmp_path, skeleton)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = next(n for n in tensors if "experts.base_layer" in n or "experts.lora_A" in n)
    for side in ("lora_A", "lora_B"):
        del tensors[lost.replace("lora_A", side).replace("lora_B", side)]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterRejectedError, match=r"no weights for .*experts"):
        verify_adapter(tmp_path, names, LORA)


@TYPES
def test_a_row_in_company_has_the_losses_that_it_has_alone(name, mixtures):
    model = add_lora(load_base(mixtures[name], NF4, CPU), LORA, seed=1).eval()
    module = module_of(model)
    assert module.row_by_row == (name == "gpt_oss")  # whose masks look over the ends of rows
    rows = random_rows(24, 9, 31)
    with torch.no_grad():
        together = module(*call_arguments(end_to_end(rows), CPU))
        alone = torch.cat([module(*call_arguments(end_to_end([row]), CPU)) for row in rows])
    assert torch.allclose(together, alone, atol=1e-3)


@TYPES
def test_the_own_forward_pass_computes_what_transformers_computes(name, mixtures):
    plain = AutoModelForCausalLM.from_pretrained(mixtures[name], dtype=torch.float32).eval()
    assert distance(probabilities(load_base(mixtures[name], PLAIN, CPU)), probabilities(plain)) < 1e-5


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", [QuantizationType.NF4, QuantizationType.FP4])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_experts_are_what_bitsandbytes_makes_of_them(name, kind, double, mixtures):
    quantization = QuantizationSpec(type=kind, double_quantization=double, compute_type=ComputeType.FLOAT32)
    plain = expert_parameters(load_base(mixtures[name], PLAIN, CPU))
    for full, parameter in expert_parameters(load_base(mixtures[name], quantization, CPU)).items():
        weight = plain[full]
        assert parameter.quant_state.shape == weight.shape
        count = weight[0].numel()
        padded = torch.nn.functional.pad(weight.detach().reshape(len(weight), -1), (0, -count % 64))
        packed, state = bnb.quantize_4bit(padded, quant_type=kind.value.lower(), compress_statistics=double)
        want = bnb.dequantize_4bit(packed, state)[:, :count].view_as(weight)
        assert torch.equal(FrozenExperts(parameter).of(list(range(len(weight)))), want)
        assert torch.equal(FrozenExperts(parameter).of([0, 2]), want[[0, 2]])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_an_expert_may_end_within_a_block(storage):
    weights = torch.randn(3, 5, 7)
    packer = Packer(weights.shape, torch.float32, CPU, Format("nf4", double=False, storage=storage))
    for index, weight in enumerate(weights):
        packer.put(index, weight)
    packed = FrozenExperts(packer.parameter())
    for index, weight in enumerate(weights):
        data, state = bnb.quantize_4bit(weight, quant_type="nf4")
        assert torch.equal(packed.of([index])[0], bnb.dequantize_4bit(data, state))


@pytest.fixture(scope="session")
def wide_mixture(tmp_path_factory):
    """Many experts, beside which all else is small."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {**SHAPE, "num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "hidden_size": 256}
    save_mixture(folder, "qwen3_moe", **sizes, head_dim=64)
    return folder


def test_while_loading_two_experts_at_most_are_there_in_16_bits(wide_mixture, monkeypatch):
    """Tensors that were read or converted and are still alive, as each expert is packed."""
    live = weakref.WeakSet()
    highest = []
    read, put = hf_quantizers._expert, Packer.put

    def counted_read(*arguments):
        tensor = read(*arguments)
        live.add(tensor)
        return tensor

    def counted_put(packer, index, weight):
        live.add(weight)
        highest.append(sum(t.nbytes for t in live))
        put(packer, index, weight)

    monkeypatch.setattr(hf_quantizers, "_expert", counted_read)
    monkeypatch.setattr(Packer, "put", counted_put)
    load_base(wide_mixture, QuantizationSpec(compute_type=ComputeType.BFLOAT16), CPU)
    assert len(highest) == 2 * 2 * 32  # layers, weights, experts
    assert max(highest) <= 2 * (2 * 256 * 256 * 2)


def test_an_experts_weight_takes_half_a_byte_and_its_constants(wide_mixture):
    model = load_base(wide_mixture, QuantizationSpec(compute_type=ComputeType.BFLOAT16), CPU)
    found = weight_bytes(torch.nn.ParameterList(expert_parameters(model).values()))
    weights = 2 * 32 * 3 * 256 * 256
    assert sum(found.values()) / weights < 0.53


@pytest.mark.parametrize("name", ["phimoe", "llama4_text"])
def test_routers_are_neither_quantized_nor_adapted(name, mixtures):
    base = load_base(mixtures[name], NF4, CPU)
    routers = router_names(base)
    assert routers
    assert not any(hasattr(base.get_submodule(n).weight, "quant_state") for n in routers)
    assert not routers & linear_layers(base).keys()
    with pytest.raises(UserError) as caught:
        check_targets(base, LoRASpec(target_modules=["q_proj", "router"]), "tiny")
    assert str(caught.value) == 'spec.lora.targetModules: "router" is a router of tiny: routers are not adapted'


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        pytest.param(["q_proj"], {"q_proj"}, id="no-experts"),
        pytest.param(["experts.down_proj"], {"experts"}, id="one-weight"),
        pytest.param(["v_proj", "gate_up_proj"], {"v_proj", "experts"}, id="both"),
    ],
)
def test_targets_name_experts_as_they_name_layers(targets, adapted, mixtures):
    lora = LoRASpec(rank=4, target_modules=targets)
    model = add_lora(load_base(mixtures["mixtral"], NF4, CPU), lora, seed=1)
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in trainable(model)} == adapted


def test_what_is_quantized_and_adapted_is_counted(mixtures):
    found = coverage_of(add_lora(load_base(mixtures["qwen2_moe"], NF4, CPU), LORA, seed=1))
    experts = 2 * 8 * 3 * 64 * 32
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64 + 64)
    assert found.quantized == experts + layers
    assert found.weights == sum(p.numel() for p in meta_model(mixtures["qwen2_moe"]).parameters())
    assert found.adapted == "16 of 16 linear layers, the experts of 2 of 2 layers"
    some = LoRASpec(rank=4, target_modules=["q_proj"])
    assert coverage_of(add_lora(load_base(mixtures["phimoe"], NF4, CPU), some, seed=1)).adapted == (
        "2 of 8 linear layers, the experts of 0 of 2 layers"
    )


@TYPES
def test_what_is_planned_to_be_quantized_and_adapted_is(name, mixtures):
    config = json.loads((mixtures[name] / "config.json").read_text())
    tensors = tensor_infos(safetensors_header(mixtures[name] / "model.safetensors"))
    planned = planned_coverage(model_shape(config, tensors), LORA, NF4)
    found = coverage_of(add_lora(load_base(mixtures[name], NF4, CPU), LORA, seed=1))
    assert (planned.quantized, planned.adapted) == (found.quantized, found.adapted)
    assert planned.weights == pytest.approx(found.weights, rel=1e-3)  # buffers on disk are planned as weights


def test_experts_named_for_a_dense_base_are_refused(tiny_models):
    with pytest.raises(UserError, match=r'"experts\.down_proj" matches no linear layer of tiny'):
        check_targets(meta_model(tiny_models["llama"]), LoRASpec(target_modules=["experts.down_proj"]), "tiny")


def test_dora_on_experts_is_refused_with_what_to_do(mixtures):
    skeleton = meta_model(mixtures["mixtral"])
    with pytest.raises(UserError) as caught:
        check_targets(skeleton, LoRASpec(dora=True), "tiny")
    assert str(caught.value) == (
        "spec.lora.dora: true is not available for experts, which tiny has: set false, or name linear layers in "
        "spec.lora.targetModules"
    )
    check_targets(skeleton, LoRASpec(dora=True, target_modules=["q_proj"]), "tiny")


def test_dropout_is_of_the_training_alone(mixtures, tmp_path):
    model = add_lora(load_base(mixtures["mixtral"], NF4, CPU), LoRASpec(rank=4, dropout="0.5"), seed=1)
    steps(model, 1)
    export_adapter(model, {n: p.detach() for n, p in trainable(model).items()}, tmp_path, "base", "main")
    plain = AutoModelForCausalLM.from_pretrained(mixtures["mixtral"], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert loaded.peft_config["default"].lora_dropout == 0
