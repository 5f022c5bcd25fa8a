"""Bases measured layer by layer, as transformers reads them, in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import bitsandbytes.functional as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from composites import COMPOSITES
from mixtures import MIXTURES
from qlora_api.contract import ExitCode
from qlora_api.spec import ComputeType, QuantizationSpec, QuantizationType
from qlora_trainer.errors import UserError
from qlora_trainer.inspection.loading import measure_base
from qlora_trainer.model.base_model import load_base
from qlora_trainer.model.experts.structure import expert_parameters
from qlora_trainer.model.experts.targets import linear_layers
from quantized_bases import quantized_base

CPU = torch.device("cpu")
PLAIN = QuantizationSpec(type=QuantizationType.NONE, compute_type=ComputeType.BFLOAT16)


def measured(folder):
    found = []
    measure_base(folder, CPU, found.append)
    return {layer["name"]: layer for layer in found}


def weights_of(folder):
    """Return the matrices of every layer, those of experts one after another."""
    model = load_base(folder, PLAIN, CPU)
    return {name: [layer.weight] for name, layer in linear_layers(model).items()} | {
        name: list(parameter) for name, parameter in expert_parameters(model).items()
    }


def error_of_bitsandbytes(matrices, kind, block, *, double=False):
    """Pack all matrices, each from a block of its own on, and restore them."""
    flat = [torch.nn.functional.pad(m.detach().float().reshape(-1), (0, -m.numel() % block)) for m in matrices]
    whole = torch.cat(flat)
    packed, state = bnb.quantize_4bit(whole, blocksize=block, quant_type=kind, compress_statistics=double)
    return ((bnb.dequantize_4bit(packed, state) - whole).norm() / whole.norm()).item()


def int8_of_bitsandbytes(matrices):
    squared = total = 0.0
    for matrix in matrices:
        packed, scales, _ = bnb.int8_vectorwise_quant(matrix.detach().half())
        squared += (packed.float() * scales.view(-1, 1) / 127 - matrix.float()).square().sum().item()
        total += matrix.float().square().sum().item()
    return (squared / total) ** 0.5


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3"])
def test_errors_are_those_of_bitsandbytes(name, tiny_models):
    _check(tiny_models[name])


@pytest.mark.parametrize("name", MIXTURES)
def test_errors_of_experts_are_those_of_bitsandbytes(name, mixtures):
    _check(mixtures[name])


@pytest.mark.parametrize("name", COMPOSITES)
def test_of_a_base_with_towers_the_language_model_alone_is_measured(name, composites):
    _check(composites[name])


@pytest.mark.parametrize("kind", ["gpt_oss", "llama", "mistral3"])
def test_a_base_in_mxfp4_or_fp8_is_measured_as_it_is_dequantized(kind, tmp_path):
    _check(quantized_base(tmp_path, kind))


def _check(folder):
    found, weights = measured(folder), weights_of(folder)
    assert found.keys() == weights.keys()
    for name, matrices in weights.items():
        layer, errors = found[name], found[name]["errors"]
        assert (layer["experts"], layer["outputs"], layer["inputs"]) == (len(matrices), *matrices[0].shape)
        for block in (32, 64, 128, 256):
            for kind in ("NF4", "FP4"):
                want = error_of_bitsandbytes(matrices, kind.lower(), block)
                assert errors[kind][str(block)] == pytest.approx(want, abs=1e-6)
            want = error_of_bitsandbytes(matrices, "nf4", block, double=True)
            assert errors["NF4+DQ"][str(block)] == pytest.approx(want, abs=1e-6)
        assert errors["INT8"] == pytest.approx(int8_of_bitsandbytes(matrices), abs=1e-6)


def test_outliers_are_counted_in_standard_deviations(tmp_path):
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.copy_(torch.linspace(-1, 1, 4096).view(64, 64))  # deviation 0.577
        weight[0, 0], weight[5, 5] = 8, -2.5
    model.save_pretrained(tmp_path)
    layer = measured(tmp_path)["model.layers.0.mlp.down_proj"]
    deviation = weight.std(correction=0).item()
    assert layer["outliers"] == {"3": 2 / 4096, "6": 1 / 4096}
    assert layer["largest"] == pytest.approx((8 - weight.mean().item()) / deviation, rel=1e-4)


PROGRAM = textwrap.dedent("""
    import sys, threading
    from pathlib import Path
    import torch
    from qlora_trainer.inspection.loading import measure_base

    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) << 10

    folder, tiny = sys.argv[1:]
    measure_base(Path(tiny), torch.device("cpu"), lambda layer: None)  # imports, threads, kernels
    before, peak, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    threading.Thread(target=watch).start()
    try:
        measure_base(Path(folder), torch.device("cpu"), lambda layer: None)
    finally:
        done.set()
    print(peak[0] - before)
""")


def test_no_more_memory_is_taken_than_three_times_the_largest_tensor(tmp_path, tiny_models):
    """A base of 220 MB in shards of 40 MB, whose largest tensors are embedding and head."""
    shape = LlamaConfig(
        vocab_size=32768,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=20,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(tmp_path, max_shard_size="40MB")
    largest = 32768 * 512 * 2
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(tiny_models["llama"])]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    taken = int(done.stdout.split()[-1])
    assert taken <= 3 * largest


def test_the_command_prints_a_line_for_each_layer(tiny_models, tmp_path):
    command = [sys.executable, "-m", "qlora_trainer.inspection", "--model", str(tiny_models["llama"])]
    done = subprocess.run([*command, "--cache-dir", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.USER_ERROR  # a base needs a tokenizer
    assert "\nMODEL: " in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_a_base_that_is_quantized_on_disk_is_refused(tiny_models, tmp_path):
    config = json.loads((tiny_models["llama"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"MODEL: .* is quantized on disk: inspect the 16-bit base"):
        measured(tmp_path)
