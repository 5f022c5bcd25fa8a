"""The formulas against figures of papers, libraries and published runs."""

from __future__ import annotations

import pytest

from qlora_api.errors import FieldError
from qlora_api.spec import LoRASpec, Optimizer, ParallelismSpec, QuantizationSpec
from qlora_api.status import MemoryComponent
from qlora_memory import GPUS, AdapterShape, EstimateInput, Moment, estimate, flop_per_token, model_shape
from qlora_memory.optimizer import checkpoint_bytes, moment_bytes, partitions, training_state
from qlora_memory.shape.model_shape import Linear
from qlora_memory.weights import constant_bytes, quantized_bytes

from .shapes import LLAMA_8B, figures, llama_8b

LAYER = Linear("q_proj", 4096, 4096)
NF4 = QuantizationSpec()


def run(**changes):
    values = {
        "shape": llama_8b(),
        "lora": LoRASpec(),
        "quantization": NF4,
        "optimizer": Optimizer.PAGED_ADAMW_8BIT,
        "parallelism": ParallelismSpec(),
        "world_size": 1,
        "rows": (2048,),
        "checkpointing": True,
    }
    return EstimateInput(**{**values, **changes})


# -------------------------------------------------------------------------------------------------------------- weights


def test_nf4_with_double_quantization_is_0_516_bytes_a_weight():
    bits = 8 * (quantized_bytes(LAYER, NF4) + constant_bytes(LAYER, NF4)) / LAYER.elements
    assert bits == pytest.approx(8 * 0.516, rel=1e-3)


def test_double_quantization_takes_0_127_bits_in_place_of_0_5():
    single = QuantizationSpec(double_quantization=False)
    assert 8 * constant_bytes(LAYER, NF4) / LAYER.elements == pytest.approx(0.127, abs=1e-3)
    assert 8 * constant_bytes(LAYER, single) / LAYER.elements == pytest.approx(0.5, abs=1e-3)


def test_a_llama_3_8b_has_the_published_number_of_weights():
    assert llama_8b().parameters == 8_030_261_248


def test_rank_16_on_all_linear_layers_of_an_8b_is_42_million():
    assert AdapterShape(llama_8b(), LoRASpec()).parameters == 41_943_040


def test_a_target_that_names_nothing_is_named():
    adapter = AdapterShape(llama_8b(), LoRASpec(target_modules=["q_prj"]))
    with pytest.raises(
        FieldError, match=r'spec.lora.targetModules: "q_prj" matches no linear layer .* q_proj, up_proj'
    ):
        _ = adapter.layers


# ------------------------------------------------------------------------------------------------------- state and ZeRO


def test_moments():
    assert moment_bytes((4096 * 4,), Optimizer.ADAMW_8BIT) == 2 * 4096 * 4 + 8 * 64 + 2048
    assert moment_bytes((4095,), Optimizer.ADAMW_8BIT) == 8 * 4095
    assert moment_bytes((10, 20), Optimizer.PAGED_ADAMW_32BIT) == 240
    assert moment_bytes((10, 20), Optimizer.ADAMW) == 248


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_divides_the_state_and_brings_buckets(stage):
    adapter = AdapterShape(llama_8b(), LoRASpec())
    whole = training_state(adapter, Optimizer.ADAMW, ParallelismSpec(), 4)
    shared = training_state(adapter, Optimizer.ADAMW, ParallelismSpec(zero_stage=stage), 4)
    assert shared.gradients == whole.gradients / 4
    assert shared.optimizer == pytest.approx((whole.optimizer + 4 * adapter.parameters) / 4, rel=1e-3)
    assert shared.backward_buffers == (1 if stage == 3 else 2) * 4 * adapter.parameters
    assert sum(partitions(adapter, stage, 4)) == pytest.approx(adapter.parameters / 4, rel=1e-3)


def test_offload_leaves_nothing_of_the_optimizer_on_the_gpu():
    adapter = AdapterShape(llama_8b(), LoRASpec())
    state = training_state(adapter, Optimizer.PAGED_ADAMW_8BIT, ParallelismSpec(zero_stage=2, offload="Optimizer"), 2)
    assert (state.optimizer, state.gradients, state.paged) == (0, 0, 0)
    assert state.host == pytest.approx(16 * adapter.parameters / 2, rel=1e-3)


def test_a_checkpoint_holds_the_adapter_once():
    adapter = AdapterShape(llama_8b(), LoRASpec())
    alone = checkpoint_bytes(adapter, Optimizer.ADAMW, ParallelismSpec(), 1)
    assert alone == pytest.approx(12 * adapter.parameters, rel=1e-3)
    assert checkpoint_bytes(adapter, Optimizer.ADAMW, ParallelismSpec(zero_stage=2), 4) == pytest.approx(
        16 * adapter.parameters, rel=1e-3
    )


# ------------------------------------------------------------------------------------------------------- published runs


@pytest.mark.parametrize("point", figures().POINTS, ids=lambda p: f"{p.sequences}-packs")
def test_the_published_points_are_reproduced(point):
    assert point.predicted == pytest.approx(point.measured, rel=0.02)
    assert point.measured == pytest.approx(5.89e9 + 0.520e6 * 4096 * point.sequences, rel=0.001)


@pytest.mark.parametrize("point", figures().HELD_OUT, ids=lambda p: f"{p.sequences}-packs")
def test_runs_that_no_formula_was_made_for_are_predicted(point):
    assert point.predicted == pytest.approx(point.measured, rel=0.02)


def test_the_page_has_the_figures():
    module = figures()
    page = module.PAGE.read_text(encoding="utf-8")
    assert module.filled(page) == page, "stale: python benchmarks/memory_figures.py"


def test_a_70b_trains_on_one_48_gb_gpu():
    shape = model_shape(figures().MODELS["Llama-3.1-70B"])
    needed = estimate(run(shape=shape, rows=(512,))).needed_bytes
    assert needed < 44.5 * 2**30  # QLoRA, abstract: a 65B on 48 GB


# ---------------------------------------------------------------------------------------------------------- activations


def test_checkpoints_are_two_bytes_times_hidden_a_token_and_layer():
    slope = _activations(rows=(4096,)) - _activations(rows=(2048,))
    assert slope == pytest.approx(2048 * 2 * 4096 * 32, rel=0.01)


def test_the_fp32_upcast_costs_two_gigabytes_on_an_8b():
    from qlora_memory.activations.setting import Software

    lifted = estimate(run(software=Software(fp32_embeddings=True))).peak_bytes
    assert lifted - estimate(run()).peak_bytes == pytest.approx(2.1e9, rel=0.01)


def test_logits_of_the_whole_vocabulary_only_where_the_head_is_not_plain():
    plain = estimate(run(rows=(8192,))).moments[Moment.LOSS][MemoryComponent.LOGITS]
    capped = estimate(run(shape=llama_8b(final_logit_softcapping=30.0), rows=(8192,)))
    assert plain < 1e9
    assert capped.moments[Moment.LOSS][MemoryComponent.LOGITS] == pytest.approx(14 * 8192 * 128256, rel=0.1)


def test_prompt_tokens_cost_no_logits():
    own = {"shape": llama_8b(final_logit_softcapping=30.0), "rows": (8192,)}
    few = estimate(run(**own, targets=1024)).moments[Moment.LOSS][MemoryComponent.LOGITS]
    assert few < estimate(run(**own)).moments[Moment.LOSS][MemoryComponent.LOGITS] / 5


def test_gradients_of_earlier_micro_batches_are_there():
    more = estimate(run(accumulates=True)).peak_bytes - estimate(run(accumulates=False)).peak_bytes
    assert more == 4 * 41_943_040


def test_components_sum_to_what_is_needed():
    found = estimate(run(world_size=2), GPUS["h100-80gb"])
    assert sum(found.components.values()) == found.needed_bytes
    assert found.as_status()["peak"] == found.needed_bytes - found.context_bytes - found.fragmentation_bytes - (
        found.paged_bytes
    )


def test_memory_grows_with_everything_that_takes_it():
    base = estimate(run()).needed_bytes
    for change in (
        {"rows": (4096,)},
        {"lora": LoRASpec(rank=64)},
        {"checkpointing": False},
        {"quantization": QuantizationSpec(type="INT8")},
        {"optimizer": Optimizer.ADAMW},
        {"lora": LoRASpec(dropout="0.1")},
        {"parallelism": ParallelismSpec(zero_stage=1)},
        {"world_size": 2},
    ):
        assert estimate(run(**change)).needed_bytes > base, change


def _activations(**changes):
    return estimate(run(**changes)).moments[Moment.BACKWARD][MemoryComponent.ACTIVATIONS]


# ----------------------------------------------------------------------------------------------------------- arithmetic


def test_flop_per_token_are_the_published_ones():
    shape = llama_8b()
    none = AdapterShape(shape, LoRASpec(rank=1, target_modules=["model.layers.0.self_attn.k_proj"]))
    assert flop_per_token(shape, none, 4096, recomputes=False) / 1e9 == pytest.approx(33.8, abs=0.05)
    assert flop_per_token(shape, none, 4096, recomputes=True) / 1e9 == pytest.approx(48.8, abs=0.1)


def test_a_mixture_counts_the_experts_that_work():
    mixture = model_shape(figures().MODELS["Mixtral-8x7B"])
    assert mixture.parameters == 46_702_792_704
    assert mixture.active_linear_elements() == pytest.approx(12.7e9, rel=0.01)


def test_configurations_that_lack_a_size_are_named():
    with pytest.raises(FieldError, match=r'config\.json has no "vocab_size"'):
        model_shape({k: v for k, v in LLAMA_8B.items() if k != "vocab_size"})
