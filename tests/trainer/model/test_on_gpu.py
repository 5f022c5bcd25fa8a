"""Properties that only a GPU can show: its attention kernel, its quantization and its losses beside the CPU's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qlora_api.spec import ComputeType, LoRASpec, QuantizationSpec, QuantizationType
from qlora_trainer.model.base_model import add_lora, load_base, trainable, weight_bytes
from qlora_trainer.model.device import attention
from qlora_trainer.model.device.attention import packed_attention
from qlora_trainer.model.loss import NextTokenLoss, call_arguments, end_to_end, head_is_plain, rows_are_apart
from random_rows import random_rows
from tiny_models import CONFIGS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LENGTHS = (40, 7, 90, 21)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("pairs", [8, 2])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_packed_attention_and_its_gradients_are_the_cpus(window, pairs, dim):
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    inputs = [torch.randn(1, heads, sum(LENGTHS), dim, generator=generator).bfloat16() for heads in (8, pairs, pairs)]
    found = []
    for device, dtype in ((CPU, torch.float32), (GPU, torch.bfloat16)):
        learning = [x.to(device, dtype).requires_grad_() for x in inputs]
        out, _ = packed_attention(
            SimpleNamespace(num_key_value_groups=8 // pairs),
            *learning,
            None,
            cu_seq_lens_q=starts.to(device),
            max_length_q=max(LENGTHS),
            sliding_window=window,
        )
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (out * weights.to(device, dtype)).sum().backward()
        found.append([t.detach().float().cpu() for t in (out, *(x.grad for x in learning))])
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert (on_gpu - on_cpu).norm() / on_cpu.norm() < 1e-2


def adapted(path, quantization, device):
    model = add_lora(load_base(path, quantization, device), LoRASpec(rank=4, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(3)
    for parameter in trainable(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.05).to(device)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "nats"),
    [
        ("NF4", 0.02),
        ("None", 0.02),
        ("FP4", 0.1),  # 0.04 on an H200
        ("INT8", 0.1),  # 0.02 on an H200: a CPU keeps the inputs in 16 bits
    ],
)
def test_losses_and_gradients_are_the_cpus(kind, nats, tiny_models):
    quantization = QuantizationSpec(type=QuantizationType(kind), compute_type=ComputeType.BFLOAT16)
    rows, found = random_rows(*LENGTHS), []
    for device in (CPU, GPU):
        model = adapted(tiny_models["llama"], quantization, device)
        losses = NextTokenLoss(model, fused=head_is_plain(model))(*call_arguments(end_to_end(rows), device))
        losses.mean().backward()
        gradient = torch.cat([p.grad.flatten().cpu() for p in trainable(model).values()])
        found.append((losses.detach().cpu(), gradient, weight_bytes(model)))
    (losses, gradient, sizes), (on_gpu, gradient_on_gpu, sizes_on_gpu) = found
    assert sizes == sizes_on_gpu
    assert (losses - on_gpu).abs().mean() < nats
    if nats < 0.1:
        assert torch.cosine_similarity(gradient, gradient_on_gpu, dim=0) > 0.99


@pytest.mark.parametrize("flash", [True, False], ids=["ampere", "turing"])
def test_scaled_float16_has_the_losses_and_gradients_of_float32(flash, tiny_models, monkeypatch):
    if not flash:
        monkeypatch.setattr(attention, "bf16_in_hardware", lambda _: False)
    rows, found, scale = random_rows(*LENGTHS), [], 1024.0
    for compute, by in ((ComputeType.FLOAT32, 1.0), (ComputeType.FLOAT16, scale)):
        model = adapted(tiny_models["llama"], QuantizationSpec(compute_type=compute), GPU)
        losses = NextTokenLoss(model, fused=head_is_plain(model))(*call_arguments(end_to_end(rows), GPU))
        (losses.mean() * by).backward()
        found.append((losses.detach(), torch.cat([p.grad.flatten() / by for p in trainable(model).values()])))
    (losses, gradient), (in_float16, gradient_in_float16) = found
    assert (losses - in_float16).abs().mean() < 0.02
    assert torch.cosine_similarity(gradient, gradient_in_float16, dim=0) > 0.99


@pytest.mark.parametrize("compute", ["BFloat16", "Float16", "Float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_apart(name, compute, tiny_models):
    model = adapted(tiny_models[name], QuantizationSpec(compute_type=ComputeType(compute)), GPU)
    module = NextTokenLoss(model, fused=head_is_plain(model))
    assert rows_are_apart(module, GPU)
    rows = random_rows(*LENGTHS)
    packed = module(*call_arguments(end_to_end(rows), GPU))
    alone = torch.cat([module(*call_arguments(end_to_end([row]), GPU)) for row in rows])
    assert (packed - alone).abs().mean() < (1e-4 if compute == "Float32" else 0.02)
