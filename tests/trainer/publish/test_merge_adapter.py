"""An adapter on its base, merged or not: what is loaded, and whether it is as good."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_trainer.errors import AdapterRejectedError
from qlora_trainer.publish.merge_adapter import load_adapter
from services.opened_files import opened_files


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
