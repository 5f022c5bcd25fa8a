"""A toy of a base is trained in Prepare: what works passes, and what would fail in each attempt is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3RMSNorm

from composites import COMPOSITES
from mixtures import MIXTURES
from models.tiny_base import write_base
from qlora_api import QLoRAJobSpec
from qlora_trainer.errors import UserError
from qlora_trainer.model import trained_tokens
from qlora_trainer.model.composite import meta_model_of
from qlora_trainer.model.loss import FrozenHead
from qlora_trainer.model.trial import try_training as try_training_module
from qlora_trainer.model.trial.shrink import MOST_LAYERS, shrunk
from qlora_trainer.model.trial.toy import LARGEST, toy_config
from qlora_trainer.model.trial.try_training import TrialResult, try_training
from tiny_models import CONFIGS

REFUSED = {
    "paligemma": r"computes other logits for a text without its other inputs \(by \d+% of their deviation\)",
    "recurrent_gemma": r'type "recurrent_gemma", which cannot be trained .*: Trying to backward through the graph',
    "rwkv": r'type "rwkv", which cannot be trained here: .* ends in KeyError: .*\(modeling_rwkv.py:\d+ ',
}
"""Errors for model types that have a class, and whose toy that class can compute."""
MIXED = frozenset({"gpt_oss", "qwen3_5", "qwen3_5_moe", "qwen3_next"})
"""Types of the fixtures whose rows influence each other on a CPU."""
LARGE = (
    "deepseek_v3",
    "gemma3",
    "granitemoehybrid",
    "jamba",
    "llama4",
    "mistral4",
    "nemotron_h",
    "qwen3_5_moe",
    "qwen3_moe",
    "zamba2",
)
"""Types whose default configuration is that of a large base, with layers of all its kinds."""


def spec_of(**more):
    return QLoRAJobSpec.model_validate(
        {
            "model": {"source": "s3://models/base"},
            "dataset": {"train": {"source": "s3://rows/rows.jsonl"}, "format": "Text"},
            "training": {"maxSteps": 1},
            "output": {"destination": "s3://out/adapter"},
            **more,
        }
    )


@pytest.mark.parametrize("name", [*CONFIGS, *MIXTURES, *COMPOSITES])
def test_what_can_be_trained_passes(name, tiny_models, mixtures, composites):
    folder = {**tiny_models, **mixtures, **composites}[name]
    assert try_training(folder, spec_of(), "base") == TrialResult(mixes_rows=name in MIXED)


def test_a_tower_that_knows_no_attention_but_its_own_is_no_hindrance(tmp_path):
    write_base("deepseek_vl_hybrid", tmp_path)
    assert try_training(tmp_path, spec_of(), "base") == TrialResult(mixes_rows=False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_fail_in_each_attempt_is_refused(name, tmp_path):
    write_base(name, tmp_path)
    with pytest.raises(UserError, match=f'^spec.model.source: "base" is of (a class that|the) {REFUSED[name]}'):
        try_training(tmp_path, spec_of(), "base")


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"quantization": {"type": "INT8"}}, id="INT8"),
        pytest.param({"quantization": {"type": "None", "computeType": "Float32"}}, id="no-quantization"),
        pytest.param({"quantization": {"computeType": "Float16"}}, id="Float16"),
        pytest.param({"lora": {"dora": True}}, id="DoRA"),
        pytest.param({"lora": {"targetModules": ["q_proj", "lm_head"], "dropout": "0.1"}}, id="head"),
        pytest.param({"lora": {"trainTokens": ["a", "b"]}}, id="trained-tokens"),
        pytest.param({"lora": {"targetModules": ["model.layers.77.self_attn.q_proj"]}}, id="layer-that-a-toy-lacks"),
    ],
)
def test_settings_of_the_job_are_tried(more, tiny_models):
    assert try_training(tiny_models["llama"], spec_of(**more), "base") == TrialResult(mixes_rows=False)


def test_tokens_that_cannot_be_trained_are_found(tiny_models, monkeypatch):
    monkeypatch.setattr(trained_tokens, "_forward", refuse_rows)
    assert try_training(tiny_models["llama"], spec_of(), "base") == TrialResult(mixes_rows=False)
    monkeypatch.setattr(try_training_module, "_fault_of_this_machine", lambda _: None)
    with pytest.raises(UserError, match="a trial at toy size ends in RuntimeError: no trained rows"):
        try_training(tiny_models["llama"], spec_of(lora={"trainTokens": ["a"]}), "base")


def refuse_rows(*_):
    raise RuntimeError("no trained rows")


def test_a_base_whose_class_fails_by_itself_is_not_judged(tiny_models, tmp_path, caplog):
    caplog.set_level("INFO")
    config = AutoConfig.from_pretrained(tiny_models["llama"], num_key_value_heads=3)  # of 4 heads
    config.save_pretrained(tmp_path)
    assert try_training(tmp_path, spec_of(), "base") is None
    assert "the base cannot be tried: at toy size: " in caplog.text


def broken(method, exists):
    """Return a method that fails for the inputs for which there is no kernel."""

    def call(self, inputs, *more, **named):
        if not exists(inputs):
            raise RuntimeError("no kernel is registered for these arguments")
        return method(self, inputs, *more, **named)

    return call


def test_a_class_that_this_machine_cannot_compute_in_bf16_is_not_judged(tiny_models, monkeypatch, caplog):
    caplog.set_level("INFO")
    there = broken(Qwen3RMSNorm.forward, lambda inputs: inputs.dtype is torch.float32)
    monkeypatch.setattr(Qwen3RMSNorm, "forward", there)
    assert try_training(tiny_models["qwen3"], spec_of(), "base") is None
    assert "its own class fails in bf16 on a CPU: RuntimeError: no kernel" in caplog.text


def test_a_machine_that_cannot_train_a_plain_llama_judges_no_base(tiny_models, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(FrozenHead, "forward", broken(FrozenHead.forward, lambda inputs: not inputs.requires_grad))
    assert try_training(tiny_models["qwen3"], spec_of(), "base") is None
    assert "on this machine: a plain Llama fails, too: RuntimeError: no kernel" in caplog.text


def test_a_toy_that_its_class_reads_otherwise_than_it_wrote_is_not_judged(tiny_models, monkeypatch, caplog):
    caplog.set_level("INFO")
    save = Qwen3ForCausalLM.save_pretrained

    @torch.no_grad()
    def save_negated(self, folder):
        self.model.norm.weight.neg_()
        save(self, folder)
        self.model.norm.weight.neg_()

    monkeypatch.setattr(Qwen3ForCausalLM, "save_pretrained", save_negated)
    assert try_training(tiny_models["qwen3"], spec_of(), "base") is None
    assert "its class does not read what it wrote" in caplog.text


def test_layers_that_cannot_be_looked_for_in_a_toy_say_nothing_of_the_base(tiny_models, monkeypatch, caplog):
    caplog.set_level("INFO")

    def is_target(*_):
        raise KeyError("no such layer")

    monkeypatch.setattr(try_training_module, "is_target", is_target)
    spec = spec_of(lora={"targetModules": ["q_proj"]})
    assert try_training(tiny_models["qwen3"], spec, "base") is None
    assert "the base cannot be tried: at toy size: KeyError" in caplog.text


def test_layers_of_ever_more_kinds_are_few_in_a_toy():
    layers = 400
    config = {"num_hidden_layers": layers, "num_key_value_heads": [n // 3 for n in range(layers)]}
    assert shrunk(config)["num_hidden_layers"] == MOST_LAYERS


def test_a_trial_takes_one_thread_and_leaves_the_number_of_threads_as_it_was(tiny_models):
    before, used = torch.get_num_threads(), set()
    hook = register_module_forward_pre_hook(lambda *_: used.add(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        try_training(tiny_models["llama"], spec_of(), "base")
        assert (used, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)
        hook.remove()


@pytest.mark.parametrize("name", LARGE)
def test_a_large_base_is_tried_by_a_toy_of_its_class(name, tmp_path):
    config = AutoConfig.for_model(name)
    tiny = toy_config(config)
    model = meta_model_of(tiny, whole=True)
    assert type(tiny) is type(config)
    assert sum(p.numel() for p in model.parameters()) < LARGEST
    kinds = {type(module).__name__ for module in meta_model_of(config, whole=True).modules()}
    assert {type(module).__name__ for module in model.modules()} == kinds
