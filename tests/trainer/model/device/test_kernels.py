"""Replacements of a module's own forward compute the same and hold less."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_api.spec import LoRASpec, QuantizationSpec, QuantizationType
from qlora_trainer.model import base_model as model_module
from qlora_trainer.model.base_model import add_lora, load_base, trainable
from qlora_trainer.model.device.kernels import fuse_norms
from qlora_trainer.model.loss import NextTokenLoss, call_arguments, end_to_end, head_is_plain
from random_rows import random_rows

CPU = torch.device("cpu")


def losses_and_gradient(path, kind, lora):
    model = add_lora(load_base(path, QuantizationSpec(type=QuantizationType(kind)), CPU), lora, seed=1).train()
    generator = torch.Generator().manual_seed(3)
    for parameter in trainable(model).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    torch.manual_seed(0)
    losses = NextTokenLoss(model, fused=head_is_plain(model))(*call_arguments(end_to_end(random_rows(40, 21)), CPU))
    losses.sum().backward()
    return losses.detach(), torch.cat([p.grad.flatten() for p in trainable(model).values()])


@pytest.mark.parametrize("lora", [{}, {"dropout": "0.2"}], ids=["plain", "dropout"])
@pytest.mark.parametrize("kind", ["NF4", "INT8", "None"])
def test_an_adapter_adds_what_pefts_would(kind, lora, tiny_models, monkeypatch):
    spec = LoRASpec(rank=4, alpha=8, **lora)
    losses, gradient = losses_and_gradient(tiny_models["llama"], kind, spec)
    monkeypatch.setattr(model_module, "fuse_adapters", lambda _: None)
    by_peft, gradient_by_peft = losses_and_gradient(tiny_models["llama"], kind, spec)
    assert (losses - by_peft).abs().mean() < 0.02  # PEFT rounds to 16 bits three times on the way
    assert torch.cosine_similarity(gradient, gradient_by_peft, dim=0) > 0.995


def test_an_adapter_that_is_switched_off_adds_nothing(tiny_models):
    base = load_base(tiny_models["llama"], QuantizationSpec(), CPU)
    ids = torch.arange(12)[None]
    starts = torch.tensor([0, 12], dtype=torch.int32)
    inputs = {"input_ids": ids, "position_ids": ids, "cu_seq_lens_q": starts, "max_length_q": 12}
    with torch.no_grad():
        without = base(**inputs).logits
        model = add_lora(base, LoRASpec(rank=4), seed=1)
        for parameter in trainable(model).values():
            parameter.data.fill_(0.1)
        assert not torch.equal(model(**inputs).logits, without)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, without)


def test_8_bit_layers_let_go_of_their_inputs(tiny_models):
    base = load_base(tiny_models["llama"], QuantizationSpec(type=QuantizationType.INT8), CPU)
    layer = base.model.layers[0].mlp.down_proj
    x = torch.randn(1, 4, layer.in_features, dtype=torch.bfloat16).requires_grad_()
    inner = x * 1
    out, gone = layer(inner), weakref.ref(inner)
    del inner
    assert gone() is None
    out.sum().backward()
    assert x.grad.abs().sum() > 0


def test_norms_that_add_one_to_their_weight_are_left_alone():
    model = nn.ModuleDict({"plain": LlamaRMSNorm(8), "shifted": GemmaRMSNorm(8)})
    fuse_norms(model)
    assert "forward" in vars(model["plain"])
    assert "forward" not in vars(model["shifted"])
