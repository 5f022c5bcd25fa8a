"""Language models inside classes that also take images: trained alone, published for the whole."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from composites import COMPOSITES, save_composite
from qlora_api.spec import ComputeType, LoRASpec, QuantizationSpec, QuantizationType
from qlora_memory import AdapterShape, TensorInfo, model_shape, planned_coverage
from qlora_memory.weights import constant_bytes, quantized_bytes, quantized_layers, unquantized_bytes
from qlora_trainer.errors import AdapterRejectedError, UserError
from qlora_trainer.model.base_model import add_lora, causal_config, load_base, meta_model, trainable, weight_bytes
from qlora_trainer.model.composite import model_class, tower_names
from qlora_trainer.model.coverage import coverage_of
from qlora_trainer.model.dry_run import adapters_without_gradient
from qlora_trainer.model.experts.targets import check_targets
from qlora_trainer.model.loss import call_arguments, end_to_end
from qlora_trainer.prepare.plan_memory import shape_of
from qlora_trainer.publish.gate import verify_adapter, verify_loads, verify_merged
from qlora_trainer.publish.merge_adapter import load_adapter, merge
from qlora_trainer.training.finish import export_adapter
from random_rows import random_rows
from training_steps import distance, module_of, steps, without_gradient

CPU = torch.device("cpu")
NF4 = QuantizationSpec(compute_type=ComputeType.FLOAT32)
PLAIN = QuantizationSpec(type=QuantizationType.NONE, compute_type=ComputeType.FLOAT32)
LORA = LoRASpec(rank=4, alpha=8)
RECURRENT = ("qwen3_5", "qwen3_5_moe")
"""Rows that lie end to end are refused by these without a kernel."""
TYPES = pytest.mark.parametrize("name", COMPOSITES)


@torch.no_grad()
def own_probabilities(model):
    """Return those of every next token of a row, by the trained model."""
    inputs, _, _ = call_arguments(end_to_end([torch.arange(30) * 7 % 320]), CPU)
    return module_of(model)(inputs, torch.arange(30)).float().softmax(-1)


@torch.no_grad()
def probabilities(model):
    """Return the same by a model of transformers."""
    return model.eval()(input_ids=torch.arange(30).view(1, -1) * 7 % 320).logits[0].float().softmax(-1)


def whole(folder):
    """The class that the Hub has, with its towers."""
    return model_class(causal_config(folder)).from_pretrained(folder, dtype=torch.float32)


def trained(folder, out):
    """Return the probabilities of a trained model on an unquantized base; its adapter is exported to ``out``."""
    model = add_lora(load_base(folder, PLAIN, CPU), LORA, seed=1)
    steps(model, 2)
    export_adapter(model, {n: p.detach().clone() for n, p in trainable(model).items()}, out, str(folder), "main")
    (out / "tokenizer.json").write_text("{}")
    return own_probabilities(model)


def names_of(skeleton):
    return [n for found in (skeleton.named_modules(), skeleton.named_parameters()) for n, _ in found]


@TYPES
def test_the_language_model_alone_is_loaded_and_computes_what_the_whole_does(name, composites):
    base = load_base(composites[name], PLAIN, CPU)
    towers = tower_names(meta_model(composites[name], whole=True))
    assert towers
    assert not any(n.startswith(tuple(towers)) for n, _ in base.named_parameters())
    adapted = add_lora(base, LORA, seed=1)  # which changes nothing yet
    assert distance(own_probabilities(adapted), probabilities(whole(composites[name]))) < 1e-5


@TYPES
def test_two_steps_reach_every_adapter(name, composites):
    skeleton = add_lora(meta_model(composites[name]), LORA, seed=1)
    assert adapters_without_gradient(skeleton) == []
    model = add_lora(load_base(composites[name], NF4, CPU), LORA, seed=1)
    assert without_gradient(model) == []


@TYPES
def test_rows_lie_end_to_end_where_the_language_model_keeps_them_apart(name, composites):
    module = module_of(add_lora(load_base(composites[name], NF4, CPU), LORA, seed=1).eval())
    assert module.row_by_row == (name in RECURRENT)
    rows = random_rows(24, 9, 31)
    with torch.no_grad():
        together = module(*call_arguments(end_to_end(rows), CPU))
        alone = torch.cat([module(*call_arguments(end_to_end([row]), CPU)) for row in rows])
    assert torch.allclose(together, alone, atol=1e-3)


@TYPES
def test_peft_alone_gives_the_trained_model_on_the_whole_base(name, composites, tmp_path):
    own = trained(composites[name], tmp_path / "adapter")
    skeleton = meta_model(composites[name], whole=True)
    verify_adapter(tmp_path / "adapter", names_of(skeleton), LORA)
    verify_loads(tmp_path / "adapter", skeleton)
    plain = whole(composites[name])
    assert distance(own, probabilities(plain)) > 0.05
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert distance(probabilities(loaded), own) < 1e-4
    adapted = {n.partition(".lora_A")[0] for n, _ in loaded.named_parameters() if ".lora_A" in n}
    assert len(adapted) == sum("lora_A" in n for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    own_again = load_adapter(load_base(composites[name], PLAIN, CPU), tmp_path / "adapter")
    assert distance(own_probabilities(own_again.eval()), own) < 1e-4


@TYPES
def test_a_merge_gives_the_whole_checkpoint_back(name, composites, tmp_path):
    base, out = composites[name], tmp_path / "merged"
    own = trained(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out)
    verify_merged(out)
    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    towers = [n for n in before if "vis" in n or "projector" in n]
    assert towers
    assert all(torch.equal(before[n], after[n]) for n in towers)
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert (out / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    assert json.loads((out / "config.json").read_bytes())["model_type"] == causal_config(base).model_type
    assert distance(probabilities(whole(out)), own) < 0.02  # rounded to bf16


def tensors_of(folder):
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@TYPES
def test_the_plan_counts_the_language_model_alone(name, composites):
    shape = shape_of(composites[name])
    quantization = QuantizationSpec(compute_type=ComputeType.BFLOAT16)
    model = add_lora(load_base(composites[name], quantization, CPU), LORA, seed=1)
    layers, adapter = quantized_layers(shape, quantization), AdapterShape(shape, LORA)
    planned = {
        "quantizedWeights": sum(quantized_bytes(i, quantization) for i in layers),
        "quantizationConstants": sum(constant_bytes(i, quantization) for i in layers),
        "unquantizedWeights": unquantized_bytes(shape, quantization, adapter),
        "adapterWeights": adapter.bytes,
    }
    for component, measured in weight_bytes(model).items():
        assert planned[component] == pytest.approx(measured, rel=1e-3), component
    found, counted = planned_coverage(shape, LORA, quantization), coverage_of(model)
    assert (found.adapted, found.quantized) == (counted.adapted, counted.quantized)
    assert found.weights == pytest.approx(counted.weights, rel=1e-3)  # buffers are no weights


@pytest.mark.parametrize(("name", "head"), [("gemma3", None), ("mistral3", None), ("qwen2_5_vl", "lm_head")])
def test_names_of_older_checkpoints_are_kept_in_the_merge(name, head, composites, tmp_path):
    """As models of these types were saved by transformers 4: the towers beside the language model."""
    base = tmp_path / "base"
    base.mkdir()
    renamed = {older_name(n, name): t for n, t in tensors_of(composites[name]).items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_bytes((composites[name] / "config.json").read_bytes())
    shape, new = shape_of(base), shape_of(composites[name])
    assert (shape.parameters, shape.linears) == (new.parameters, new.linears)
    own = trained(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert tensors_of(tmp_path / "merged").keys() == renamed.keys()
    assert distance(probabilities(whole(tmp_path / "merged")), own) < 0.02


def older_name(name, model_type):
    if model_type == "qwen2_5_vl":
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
    return name.replace("model.language_model.", "language_model.model.").removeprefix("model.")


def test_an_adapter_for_the_text_class_is_refused_since_vllm_would_not_apply_it(composites, tmp_path):
    trained(composites["gemma3"], tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({n.replace("model.language_model.", "model."): t for n, t in load_file(path).items()}, path)
    with pytest.raises(AdapterRejectedError, match=r"vLLM would not apply .*language model at model\.language_model"):
        verify_adapter(tmp_path, names_of(meta_model(composites["gemma3"], whole=True)), LORA)


@pytest.mark.parametrize("target", ["out_proj", "vision_tower.encoder.layers.0.self_attn.q_proj"])
def test_a_tower_is_no_target(target, composites):
    with pytest.raises(UserError, match=r"is in a tower of base for images or sound"):
        check_targets(meta_model(composites["gemma3"]), LoRASpec(target_modules=[target]), "base")


def test_sizes_that_a_configuration_leaves_to_its_class_are_read_from_the_tensors(composites):
    config = json.loads((composites["gemma3"] / "config.json").read_bytes())
    tensors = {n: TensorInfo("BF16", tuple(t.shape)) for n, t in tensors_of(composites["gemma3"]).items()}
    wanted = model_shape(config, tensors)
    for key in ("num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim"):
        del config["text_config"][key]
    assert model_shape(config, tensors) == wanted


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")  # of PEFT
def test_a_tied_head_that_is_adapted_gets_weights_of_its_own(tmp_path):
    base = tmp_path / "base"
    save_composite(base, "gemma3")
    model = add_lora(load_base(base, PLAIN, CPU), LoRASpec(rank=4, target_modules=["lm_head", "q_proj"]), seed=1)
    steps(model, 2)
    tensors = {n: p.detach().clone() for n, p in trainable(model).items()}
    export_adapter(model, tensors, tmp_path / "adapter", str(base), "main")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert distance(probabilities(whole(tmp_path / "merged")), own_probabilities(model)) < 0.02
