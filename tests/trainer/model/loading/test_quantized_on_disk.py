"""Bases in MXFP4 and FP8: dequantized as they are read, as transformers does it, and quantized again."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from mixtures import MIXTURES, save_mixture
from qlora_api.errors import FieldError
from qlora_api.spec import ComputeType, LoRASpec, QuantizationSpec, QuantizationType
from qlora_memory import model_shape, tensor_infos
from qlora_trainer.errors import TrainerError, UserError
from qlora_trainer.model.base_model import add_lora, causal_config, check_base, load_base, trainable, weight_bytes
from qlora_trainer.model.experts.packed import FrozenExperts
from qlora_trainer.model.experts.structure import expert_parameters
from qlora_trainer.model.loading import disk_tensors
from qlora_trainer.model.loading.disk_tensors import DiskTensors, dequantized_fp8
from qlora_trainer.model.loading.missing_weights import missing_matrices
from qlora_trainer.model.loading.read_weights import notes_of
from qlora_trainer.model.loss import call_arguments, end_to_end
from qlora_trainer.prepare.plan_memory import shape_of
from qlora_trainer.publish.merge_adapter import merge
from qlora_trainer.storage.model_files import safetensors_header
from qlora_trainer.training.finish import export_adapter
from quantized_bases import LIKE_LLAMA, quantized_base, quantized_by, to_mxfp4
from random_rows import random_rows
from training_steps import steps

CPU = torch.device("cpu")
PLAIN = QuantizationSpec(type=QuantizationType.NONE, compute_type=ComputeType.BFLOAT16)
NF4 = QuantizationSpec(compute_type=ComputeType.BFLOAT16)
LORA = LoRASpec(rank=4, alpha=8)


@pytest.fixture
def mxfp4(tmp_path):
    return quantized_base(tmp_path / "base", "gpt_oss")


def weights_of(model):
    return dict(model.named_parameters())


@pytest.mark.parametrize("at_once", [disk_tensors.ELEMENTS_AT_ONCE, 96], ids=["at-once", "three-groups-at-a-time"])
def test_mxfp4_is_what_transformers_makes_of_it(at_once, mxfp4, monkeypatch):
    monkeypatch.setattr(disk_tensors, "ELEMENTS_AT_ONCE", at_once)
    found = weights_of(load_base(mxfp4, PLAIN, CPU))
    wanted = AutoModelForCausalLM.from_pretrained(
        mxfp4, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    for name, parameter in wanted.named_parameters():
        assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize("shape", [(20, 12), (18, 11), (3, 18, 11)], ids=["whole-blocks", "cut-blocks", "experts"])
def test_a_large_weight_is_dequantized_some_rows_at_a_time(shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(*shape[:-2], 5, 3, generator=generator)
    at_once = dequantized_fp8(weight, scales, torch.bfloat16, (4, 4))
    most, plain = [], disk_tensors.Fp8Dequantize._dequantize_one

    def note(self, part, *more, **named):
        most.append(part.numel())
        return plain(self, part, *more, **named)

    monkeypatch.setattr(disk_tensors.Fp8Dequantize, "_dequantize_one", note)
    monkeypatch.setattr(disk_tensors, "ELEMENTS_AT_ONCE", 2 * 4 * 12)
    assert torch.equal(dequantized_fp8(weight, scales, torch.bfloat16, (4, 4)), at_once)
    assert len(most) == 3
    assert max(most) < weight.numel()


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "deepseek_v3"])
def test_fp8_is_what_transformers_makes_of_it(kind, tmp_path):
    base = quantized_base(tmp_path, kind, block=8)  # divides every size
    found = weights_of(load_base(base, PLAIN, CPU))
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8))
    wanted = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    for name, parameter in wanted.named_parameters():
        assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize(
    ("block", "end"),
    [
        pytest.param(40, "weight_scale_inv", id="last-blocks-are-cut"),
        pytest.param(None, "weight_scale_inv", id="one-scale"),
        pytest.param(32, "scale", id="another-name"),
    ],
)
def test_layouts_of_scales(block, end, tmp_path):
    base = quantized_base(tmp_path, "llama", block=block, end=end)
    save_mixture(tmp_path / "16", "llama", vocab_size=320, **LIKE_LLAMA)
    wanted = weights_of(load_base(tmp_path / "16", PLAIN, CPU))
    for name, parameter in weights_of(load_base(base, PLAIN, CPU)).items():
        torch.testing.assert_close(parameter, wanted[name], rtol=0.08, atol=0.02)  # three bits of mantissa


def test_a_cut_block_has_its_own_scale():
    weight, scales = torch.ones(5, 3).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = dequantized_fp8(weight, scales, torch.float32, (4, 2))
    assert found[3].tolist() == [1, 1, 2]
    assert found[4].tolist() == [3, 3, 4]


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_experts_are_packed_from_what_was_dequantized(kind, tmp_path):
    quantized_base(tmp_path, kind)
    plain = expert_parameters(load_base(tmp_path, PLAIN, CPU))
    packed = load_base(tmp_path, NF4, CPU)
    for name, parameter in expert_parameters(packed).items():
        assert hasattr(parameter, "quant_state")
        found = FrozenExperts(parameter).of(list(range(plain[name].shape[0])))
        assert (found - plain[name]).float().norm() / plain[name].float().norm() < 0.15
    shape, held = shape_of(tmp_path), weight_bytes(packed)
    assert held["unquantizedWeights"] + held["quantizedWeights"] < shape.parameters


@pytest.mark.parametrize("kind", ["gpt_oss", "llama", "mistral3"])
def test_it_is_trained_and_merged_in_16_bits(kind, tmp_path):
    base, out = tmp_path / "base", tmp_path / "merged"
    quantized_base(base, kind)
    model = add_lora(load_base(base, NF4, CPU), LORA, seed=1)
    steps(model, 2, rows=(24,))
    tensors = {n: p.detach().clone() for n, p in trainable(model).items()}
    export_adapter(model, tensors, tmp_path / "adapter", str(base), "main")
    merge(base, tmp_path / "adapter", out)
    assert "quantization_config" not in json.loads((out / "config.json").read_bytes())
    infos = {n: i for p in out.glob("*.safetensors") for n, i in tensor_infos(safetensors_header(p)).items()}
    assert {info.dtype for info in infos.values()} == {"BF16"}
    assert infos.keys() == set(DiskTensors([str(base / "model.safetensors")]))
    plain = load_base(base, PLAIN, CPU)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter") if kind != "mistral3" else None
    if loaded is not None:
        inputs, _, _ = call_arguments(end_to_end(random_rows(24)), CPU)
        merged = load_base(out, PLAIN, CPU)
        with torch.no_grad():
            own, found = (m.eval()(**inputs, use_cache=False).logits[0].float().softmax(-1) for m in (loaded, merged))
        assert (own - found).abs().sum(-1).median() / 2 < 0.02  # rounding may send a token to another expert


def test_an_expert_is_read_by_itself(tmp_path):
    sizes = {**MIXTURES["gpt_oss"], "num_local_experts": 32, "hidden_size": 256, "intermediate_size": 256}
    save_mixture(tmp_path, "gpt_oss", **sizes)
    to_mxfp4(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    part = DiskTensors([str(tmp_path / "model.safetensors")])[name]
    assert part.get_shape() == [32, 256, 512]
    assert part[3:4].shape == (1, 256, 512)
    assert torch.equal(part[3:4][0], part[...][3])


def test_of_fp8_experts_in_one_tensor_those_that_are_asked_for_are_read(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    weight = torch.linspace(-4, 4, 8 * 32 * 64).view(8, 32, 64).to(torch.float8_e4m3fn)
    save_file({"experts.weight": weight, "experts.weight_scale_inv": torch.rand(8, 2, 2) + 0.5}, path)
    raw, sizes = DiskTensors._raw, []
    monkeypatch.setattr(DiskTensors, "_raw", lambda self, name: CountedSlice(raw(self, name), sizes))
    part = DiskTensors([str(path)], block=(16, 32))["experts.weight"]
    assert part.get_shape() == [8, 32, 64]
    found = part[3:4]
    assert sizes == [32 * 64, 2 * 2]
    assert torch.equal(found[0], part[...][3])


class CountedSlice:
    """A slice of a safetensors file that counts the values that are read."""

    def __init__(self, inner, sizes):
        self.inner, self.sizes = inner, sizes

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __getitem__(self, index):
        read = self.inner[index]
        self.sizes.append(read.numel())
        return read


def test_fp8_without_scales_is_found(tmp_path):
    quantized_base(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if "layers.0.mlp.up_proj.weight_scale" not in n}
    save_file(kept, path, metadata={"format": "pt"})
    for find in (shape_of, lambda folder: missing_matrices(folder, causal_config(folder))):
        with pytest.raises(UserError, match=r"has .*up_proj\.weight in FP8 without scales"):
            find(tmp_path)
    with pytest.raises(TrainerError, match=r"up_proj\.weight is in FP8 and has no scales"):
        load_base(tmp_path, PLAIN, CPU)


def test_mxfp4_without_scales_is_found(mxfp4):
    path = mxfp4 / "model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if not n.endswith("layers.0.mlp.experts.down_proj_scales")}
    save_file(kept, path, metadata={"format": "pt"})
    for find in (shape_of, lambda folder: missing_matrices(folder, causal_config(folder))):
        with pytest.raises(UserError, match=r"has .*experts\.down_proj in MXFP4 without scales"):
            find(mxfp4)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama", "mixtral"])
def test_a_base_in_mxfp4_or_fp8_lacks_nothing(kind, tmp_path):
    folder = quantized_base(tmp_path / "base", kind)
    assert missing_matrices(folder, causal_config(folder)) == []


def test_the_receipt_says_how_a_base_is_on_disk(mxfp4, tmp_path):
    assert notes_of(mxfp4) == ["the base is in MXFP4 on disk: its weights are dequantized as they are read"]
    save_mixture(tmp_path / "16", "llama", vocab_size=320, **LIKE_LLAMA)
    assert notes_of(tmp_path / "16") == []


@pytest.mark.parametrize(
    ("found", "source", "refused"),
    [
        ({"quant_method": "gptq"}, "hf://Qwen/Qwen3-8B-GPTQ-Int4", "gptq: .*perhaps hf://Qwen/Qwen3-8B "),
        ({"quant_method": "awq"}, "hf://org/Llama-3-8B-AWQ@main", "awq: .*perhaps hf://org/Llama-3-8B "),
        (
            {"quant_method": "compressed-tensors"},
            "hf://org/Model-quantized.w4a16",
            "compressed-tensors: .*perhaps hf://org/Model ",
        ),
        ({"quant_method": "gptq"}, "hf://org/some-model", r"gptq: .*made from \("),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"},
            "hf://org/model-bnb-4bit",
            "bitsandbytes' AF4: .*perhaps hf://org/model",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_plan_and_by_prepare_alike(found, source, refused, tmp_path):
    save_mixture(tmp_path, "llama", vocab_size=320, **LIKE_LLAMA)
    quantized_by(tmp_path, {**found, "bits": 4})
    with pytest.raises(UserError, match=rf'^spec.model.source: "{source}" is quantized with {refused}') as prepared:
        check_base(tmp_path, NF4, source)
    with pytest.raises(FieldError) as planned:
        shape_of_config(tmp_path, source)
    assert str(planned.value) == str(prepared.value)


def shape_of_config(folder, source):
    return model_shape(json.loads((folder / "config.json").read_bytes()), None, source)


def test_the_plan_reads_headers_of_mxfp4_and_fp8_as_those_of_the_16_bit_base(tmp_path):
    save_mixture(tmp_path / "16", "gpt_oss", **MIXTURES["gpt_oss"])
    quantized_base(tmp_path / "4", "gpt_oss")
    assert shape_of(tmp_path / "4") == shape_of(tmp_path / "16")
    save_mixture(tmp_path / "moe-16", "deepseek_v3", **MIXTURES["deepseek_v3"])
    quantized_base(tmp_path / "moe-8", "deepseek_v3", block=40)
    assert shape_of(tmp_path / "moe-8") == shape_of(tmp_path / "moe-16")
