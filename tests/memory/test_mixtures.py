"""Published mixtures of experts: their weights in 4 bits, and the cards that they fit."""

from __future__ import annotations

import pytest

from qlora_api.errors import FieldError
from qlora_api.spec import QuantizationSpec
from qlora_memory import GPUS, NoFit, Plan, PlanRequest, TensorInfo, does_not_fit, model_shape, plan
from qlora_memory.weights import constant_bytes, quantized_bytes, quantized_layers

from .shapes import figures, spec

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
}


def request(gpu, **changes):
    fields = {"dataset__maxLength": 2048, "training__globalBatchSize": 16, **changes}
    return PlanRequest(spec(**fields), model_shape(QWEN3_30B), GPUS[gpu], world_size=1)


def gpt_oss_tensors():
    """Headers of gpt-oss-20b in 16 bits."""
    found = {
        "model.embed_tokens.weight": (201088, 2880),
        "lm_head.weight": (201088, 2880),
        "model.norm.weight": (2880,),
    }
    for layer in range(24):
        prefix = f"model.layers.{layer}."
        for name, outputs, inputs in (("q", 4096, 2880), ("k", 512, 2880), ("v", 512, 2880), ("o", 2880, 4096)):
            found[f"{prefix}self_attn.{name}_proj.weight"] = (outputs, inputs)
            found[f"{prefix}self_attn.{name}_proj.bias"] = (outputs,)
        found |= {
            f"{prefix}self_attn.sinks": (64,),
            f"{prefix}mlp.router.weight": (32, 2880),
            f"{prefix}mlp.router.bias": (32,),
            f"{prefix}mlp.experts.gate_up_proj": (32, 2880, 5760),
            f"{prefix}mlp.experts.gate_up_proj_bias": (32, 5760),
            f"{prefix}mlp.experts.down_proj": (32, 2880, 2880),
            f"{prefix}mlp.experts.down_proj_bias": (32, 2880),
            f"{prefix}input_layernorm.weight": (2880,),
            f"{prefix}post_attention_layernorm.weight": (2880,),
        }
    return {name: TensorInfo("BF16", shape) for name, shape in found.items()}


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        pytest.param(QWEN3_30B, None, 30_532_122_624, id="Qwen3-30B-A3B"),
        pytest.param(GPT_OSS_20B, gpt_oss_tensors(), 20_914_757_184, id="gpt-oss-20b"),
        pytest.param(figures().MODELS["Mixtral-8x7B"], None, 46_702_792_704, id="Mixtral-8x7B"),
    ],
)
def test_the_experts_of_published_mixtures_are_planned_in_4_bits(config, tensors, parameters):
    shape = model_shape(config, tensors)
    assert shape.parameters == parameters
    found = sum(quantized_bytes(i, QuantizationSpec()) + constant_bytes(i, QuantizationSpec()) for i in shape.experts)
    assert found / sum(i.elements for i in shape.experts) < 0.53
    assert sum(i.elements for i in quantized_layers(shape, QuantizationSpec())) / parameters > 0.9


def test_qwen3_30b_fits_a_card_of_24_gb():
    chosen = plan(request("rtx4090-24gb", lora__rank=8))
    assert isinstance(chosen, Plan)
    assert chosen.fits


def test_where_the_default_rank_does_not_fit_the_plan_offers_one_that_does():
    asked = request("rtx4090-24gb")
    chosen = plan(asked)
    assert isinstance(chosen, NoFit)
    assert "would fit: spec.lora.rank 8 " in str(does_not_fit(asked, chosen))


def test_gpt_oss_in_mxfp4_is_planned_as_in_16_bits():
    packed = {}
    for name, tensor in gpt_oss_tensors().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            packed[f"{name}_blocks"] = TensorInfo("U8", (experts, outputs, inputs // 32, 16))
            packed[f"{name}_scales"] = TensorInfo("U8", (experts, outputs, inputs // 32))
        else:
            packed[name] = tensor
    config = {**GPT_OSS_20B, "quantization_config": {"quant_method": "mxfp4"}}
    assert model_shape(config, packed) == model_shape(GPT_OSS_20B, gpt_oss_tensors())


GEMMA_27B = {
    "model_type": "gemma3_text",
    "hidden_size": 5376,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 21504,
    "sliding_window": 1024,
}


def gemma_27b_tensors():
    """Headers of Gemma-3-27B with a part of its tower; older names."""
    found = {
        "language_model.model.embed_tokens.weight": (262208, 5376),
        "language_model.model.norm.weight": (5376,),
        "multi_modal_projector.mm_input_projection_weight": (1152, 5376),
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (1152, 1152),
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (4304, 1152),
    }
    layers = {
        **{f"self_attn.{name}_proj.weight": (size * 128, 5376) for name, size in (("q", 32), ("k", 16), ("v", 16))},
        "self_attn.o_proj.weight": (5376, 4096),
        **{f"self_attn.{name}_norm.weight": (128,) for name in "qk"},
        **{f"mlp.{name}_proj.weight": (21504, 5376) for name in ("gate", "up")},
        "mlp.down_proj.weight": (5376, 21504),
        **{f"{side}_{part}layernorm.weight": (5376,) for side in ("pre", "post") for part in ("feedforward_",)},
        "input_layernorm.weight": (5376,),
        "post_attention_layernorm.weight": (5376,),
    }
    for number in range(62):
        found |= {f"language_model.model.layers.{number}.{name}": shape for name, shape in layers.items()}
    return {name: TensorInfo("BF16", shape) for name, shape in found.items()}


def test_the_language_model_of_gemma_27b_is_planned_alone():
    """Counts are those of transformers' class without its tower, on the meta device."""
    shape = model_shape({"model_type": "gemma3", "text_config": GEMMA_27B, "vision_config": {}}, gemma_27b_tensors())
    assert shape.parameters == 27_009_346_304
    assert sum(layer.elements for layer in quantized_layers(shape, QuantizationSpec())) == 25_598_361_600


def test_dora_on_experts_is_refused_as_prepare_refuses_it():
    with pytest.raises(FieldError, match=r"spec.lora.dora: .* not available for experts"):
        plan(request("h100-80gb", lora__dora=True))
