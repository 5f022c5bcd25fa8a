"""An adapter on its base, merged or not: what is loaded, and whether it is as good."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_trainer.data.tokenized_rows import TokenizedRows
from qlora_trainer.errors import AdapterRejectedError
from qlora_trainer.publish import merge_adapter
from qlora_trainer.publish.gate import verify_gain, verify_merged_loss
from qlora_trainer.publish.merge_adapter import load_adapter, load_unquantized, merge, merge_in_fp32
from qlora_trainer.training.merged_loss import sample_loss
from testing.opened_files import opened_files


def small_base(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter that was trained."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(small_base(), lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_of_an_adapters_folder_peft_sees_weights_and_configuration_alone(adapter):
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    (adapter / "README.md").write_text("---\nbase_model: x\n---\n")
    with opened_files(adapter) as opened:
        assert load_adapter(small_base(), adapter).active_adapter == "default"
        assert {name.rpartition("/")[2] for name in opened()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_pickled_adapter_is_not_loaded(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(AdapterRejectedError, match=r"has no adapter_model\.safetensors"):
        load_adapter(small_base(), adapter)


def test_an_adapter_of_adapters_elsewhere_is_not_loaded(adapter):
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "XLORA", "hidden_size": 8, "adapters": {"a": "someone/adapter"}}))
    with pytest.raises(AdapterRejectedError, match="XLORA, not LORA"):
        load_adapter(small_base(), adapter)


# --------------------------------------------------------------------------------------------------------------- merged


def test_a_merged_weight_is_rounded_once(adapter):
    model = load_adapter(small_base().bfloat16(), adapter)
    layers = {n: m for n, m in model.get_base_model().named_modules() if n.endswith(("q_proj", "v_proj"))}
    sums = {n: (m.base_layer.weight.float() + m.get_delta_weight("default")).bfloat16() for n, m in layers.items()}
    rounded_twice = [m.base_layer.weight + m.get_delta_weight("default").bfloat16() for m in layers.values()]
    merged = merge_in_fp32(model)
    assert all(torch.equal(merged.get_submodule(name).weight, weight) for name, weight in sums.items())
    assert not all(map(torch.equal, sums.values(), rounded_twice))


def loss_of(model):
    rows = TokenizedRows.of([([n, *range(1, 9), n], [False, *[True] * 9]) for n in range(10, 16)])
    return sample_loss(model, rows)


TIED = pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings:UserWarning")
"""Filter for PEFT's warning about an adapter on a tied head; merging unties the head."""


@pytest.fixture
def tied(tmp_path):
    """A base whose head is its embedding, and an adapter on the head: two folders."""
    base = small_base(tie_word_embeddings=True, initializer_range=0.3)
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], lora_alpha=32, init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "base", tmp_path / "adapter"


@TIED
def test_an_adapted_head_is_untied_from_its_embedding(tied, tmp_path):
    merge(*tied, tmp_path / "merged", loss_of)
    merged, base = load_unquantized(tmp_path / "merged"), load_unquantized(tied[0])
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        adapted = load_adapter(base, tied[1]).eval()(ids).logits
        assert torch.allclose(merged(ids).logits, adapted, rtol=0.05, atol=0.3)


@TIED
def test_a_merged_model_that_is_worse_than_its_adapter_is_refused(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_adapter, "untie_adapted_head", lambda _: None)
    with pytest.raises(AdapterRejectedError, match=r"the merged model's loss .* spec\.output\.merge None"):
        merge(*tied, tmp_path / "merged", loss_of)


@pytest.mark.parametrize("merged", [1.5, float("nan"), float("inf")])
def test_a_merged_loss_that_is_larger_or_none_is_refused(merged):
    with pytest.raises(AdapterRejectedError):
        verify_merged_loss(1.0, merged)


@pytest.mark.parametrize("loss", [0.0, 1.0, 1e4, 1e300])
def test_losses_of_any_size_are_compared(loss):
    verify_merged_loss(loss, loss * 1.001)
    with pytest.raises(AdapterRejectedError):
        verify_gain(loss, 2 * loss + 1, may_be_worse=False)


def test_an_adapter_whose_loss_is_not_a_number_is_refused_even_if_it_may_be_worse():
    with pytest.raises(AdapterRejectedError, match="is nan"):
        verify_gain(1.0, float("nan"), may_be_worse=True)
