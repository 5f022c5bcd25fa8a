"""Adapters that would not learn are found without weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixtures import MIXTURES
from qlora_api.spec import LoRASpec
from qlora_trainer.errors import UserError
from qlora_trainer.model.base_model import add_lora, meta_model
from qlora_trainer.model.dry_run import adapters_without_gradient, find_layer_use
from tiny_models import CONFIGS

LORA = LoRASpec(rank=4)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_adapter_of_a_dense_base_learns(name, tiny_models, caplog):
    caplog.set_level("INFO")
    assert adapters_without_gradient(add_lora(meta_model(tiny_models[name]), LORA, seed=1)) == []
    assert "cannot be tried" not in caplog.text


@pytest.mark.parametrize("name", MIXTURES)
def test_every_adapter_of_a_mixture_learns(name, mixtures, caplog):
    caplog.set_level("INFO")
    assert adapters_without_gradient(add_lora(meta_model(mixtures[name]), LORA, seed=1)) == []
    assert "cannot be tried" not in caplog.text


def test_layers_beside_the_way_to_the_logits_are_named(tiny_models):
    skeleton = meta_model(tiny_models["llama"])
    with torch.device("meta"):
        skeleton.model.tower = nn.Linear(64, 64)
    assert adapters_without_gradient(add_lora(skeleton, LORA, seed=1)) == ["model.tower"]


def test_a_base_that_decides_by_values_is_not_judged(tiny_models, caplog):
    caplog.set_level("INFO")
    skeleton = meta_model(tiny_models["llama"])
    skeleton.model.norm.register_forward_hook(lambda *arguments: arguments[2] if arguments[2].sum() > 0 else None)
    assert adapters_without_gradient(add_lora(skeleton, LORA, seed=1)) == []
    assert "cannot be tried without weights: RuntimeError" in caplog.text


def test_layers_whose_weight_the_model_reads_itself_are_found(tiny_models):
    skeleton = meta_model(tiny_models["llama"])
    attention = skeleton.model.layers[0].self_attn

    def bound(module, _):
        module.o_proj.weight.data.clamp_(-1, 1)

    attention.register_forward_pre_hook(bound)
    before = type(attention.o_proj)
    found = find_layer_use(skeleton)
    assert type(attention.o_proj) is before
    assert found.read == {"model.layers.0.self_attn.o_proj"}


def test_layers_that_no_gradient_reaches_are_found(tiny_models):
    skeleton = meta_model(tiny_models["llama"])
    skeleton.model.layers[1].mlp.up_proj.register_forward_hook(lambda *arguments: arguments[2].detach())
    with torch.device("meta"):
        skeleton.model.tower = nn.Linear(64, 64)
    found = find_layer_use(skeleton)
    assert (found.read, found.idle) == (frozenset(), {"model.tower", "model.layers.1.mlp.up_proj"})


@pytest.mark.parametrize("name", [*CONFIGS])
def test_layers_of_a_dense_base_are_used_as_layers_are(name, tiny_models):
    found = find_layer_use(meta_model(tiny_models[name]))
    assert found.without_adapter == frozenset()


def test_a_base_that_cannot_run_on_text_alone_is_refused(tiny_models):
    skeleton = meta_model(tiny_models["llama"])

    def wants_images(*_):
        raise ValueError("You have to specify pixel_values")

    skeleton.register_forward_pre_hook(wants_images)
    with pytest.raises(UserError) as caught:
        find_layer_use(skeleton)
    assert str(caught.value) == (
        "spec.model.source: is of a class that cannot be trained on text alone; its forward pass ends in ValueError: "
        "You have to specify pixel_values"
    )
