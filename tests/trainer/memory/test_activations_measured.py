"""Activations and logits against what autograd holds, and the peak against what the allocator gives.

On the CPU, where each row is one call of scaled-dot-product attention. A GPU's variable-length attention keeps the same
without copies of keys and values for their groups; it is modelled too, and measured by
benchmarks/gpu/bench_memory_gpu.py.
"""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from memory_models import CONFIGS, save_models
from qlora_api.spec import LoRASpec, QuantizationSpec
from qlora_memory import AdapterShape, model_shape
from qlora_memory.activations.forward_backward import activations
from qlora_memory.activations.setting import ForwardSetting
from qlora_trainer.model.base_model import add_lora, enable_gradient_checkpointing, load_base
from qlora_trainer.model.loss import NextTokenLoss, call_arguments, end_to_end, head_is_plain
from random_rows import random_rows
from testing.shared import shared_folder

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")

CPU = torch.device("cpu")
ROWS = (130, 70)
LONG = (700, 500, 200)
FAMILIES = [n for n in CONFIGS if n != "wide"]
BFLOAT16 = QuantizationSpec(compute_type="BFloat16")
"""On each machine, also where it is slow: what is predicted depends on it."""
NF4, PLAIN, WIDE = (
    BFLOAT16,
    QuantizationSpec(type="None", compute_type="BFloat16"),
    QuantizationSpec(compute_type="Float32"),
)
SETTINGS = {
    "kept": (LoRASpec(), NF4, False),
    "recomputed": (LoRASpec(), NF4, True),
    "16-bit": (LoRASpec(rank=7), PLAIN, False),
    "fp32": (LoRASpec(), WIDE, False),
    "dropout": (LoRASpec(dropout="0.1", rank=4), NF4, False),
    "dora": (LoRASpec(dora=True), NF4, False),
    "bias": (LoRASpec(bias="All"), NF4, False),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    return shared_folder(tmp_path_factory, "memory-models", save_models)


def build(models, name, lora, quantization, checkpointing):
    model = add_lora(load_base(models / name, quantization, CPU), lora, seed=1)
    if checkpointing:
        enable_gradient_checkpointing(model)
    model.train()
    return NextTokenLoss(model, fused=head_is_plain(model))


def predicted(models, name, lora, quantization, checkpointing, rows):
    shape = model_shape(json.loads((models / name / "config.json").read_text()))
    setting = ForwardSetting(AdapterShape(shape, lora), quantization, rows, cuda=False, targets=sum(rows) - len(rows))
    return activations(shape, setting, checkpointing=checkpointing), shape, setting


class Held:
    """A saved tensor, for as long as autograd holds it."""

    def __init__(self, tensor):
        self.tensor = tensor


def held_bytes(loss, rows):
    """Storages that autograd holds after the forward pass; those of parameters and buffers are not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*loss.parameters(), *loss.buffers())}
    saved = weakref.WeakSet()

    def pack(tensor):
        held = Held(tensor)
        saved.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        out = loss(*call_arguments(end_to_end(random_rows(*rows)), CPU))
    gc.collect()
    storages = {h.tensor.untyped_storage().data_ptr(): h.tensor.untyped_storage().nbytes() for h in saved}
    assert out.requires_grad
    return sum(size for place, size in storages.items() if place not in own)


CASES = [(name, setting) for name in FAMILIES for setting in ("kept", "recomputed")] + [
    (name, setting)
    for name in ("llama", "gemma2", "opt", "opt-projected", "phi", "qwen2-moe")
    for setting in ("16-bit", "fp32", "dropout", "dora", "bias")
    if (name, setting) != ("qwen2-moe", "dora")  # DoRA does not adapt experts
]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_autograd_holds_what_is_predicted(name, setting, models):
    lora, quantization, checkpointing = SETTINGS[setting]
    measured = held_bytes(build(models, name, lora, quantization, checkpointing), ROWS)
    found, shape, made = predicted(models, name, lora, quantization, checkpointing, ROWS)
    rotary = 2 * shape.layers[0].attention.rotary_dim * made.tokens * made.width
    total = found.stored + found.saved_by_loss + (0 if checkpointing else rotary)
    assert total == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["down_proj"], ["v_proj", "up_proj"], ["model.layers.1.mlp.gate_proj"]]
)
def test_only_what_the_adapter_needs_is_held(targets, models):
    lora = LoRASpec(target_modules=targets)
    measured = held_bytes(build(models, "llama", lora, NF4, checkpointing=False), ROWS)
    found, _, made = predicted(models, "llama", lora, NF4, False, ROWS)
    rotary = 2 * 24 * made.tokens * made.width
    assert found.stored + found.saved_by_loss + rotary == pytest.approx(measured, rel=0.05)


def peak_bytes(loss, rows):
    """Highest total of the CPU allocator in a second forward and backward pass, as the profiler saw it."""
    for parameter in loss.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    arguments = call_arguments(end_to_end(random_rows(*rows)), CPU)
    loss(*arguments).mean().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss(*arguments).mean().backward()
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        total += change.nbytes()
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "opt", "phi", "mixtral"])
def test_the_peak_is_predicted(name, checkpointing, models):
    loss = build(models, name, LoRASpec(), NF4, checkpointing)
    measured = peak_bytes(loss, LONG)
    found, _, made = predicted(models, name, LoRASpec(), NF4, checkpointing, LONG)
    ours = 32 * made.tokens  # the micro-batch itself was there before
    assert found.stored + found.inputs - ours + max(found.loss, found.layer) == pytest.approx(measured, rel=0.07)
