"""Choices of the planner, and what would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_api.batch import BatchSplit
from qlora_api.errors import FieldError
from qlora_memory import (
    NoFit,
    Plan,
    PlanRequest,
    does_not_fit,
    plan,
    plan_of,
    remedies,
)

from .shapes import LLAMA_8B, LLAMA_70B, figures, request


@pytest.mark.parametrize(
    ("gpu", "micro", "recomputes"),
    [
        pytest.param("h100-80gb", 4, False, id="room-for-everything"),
        pytest.param("a100-40gb", 2, False, id="smaller-micro-batch-rather-than-recomputation"),
        pytest.param("l4-24gb", 1, False, id="smallest-micro-batch"),
    ],
)
def test_the_fastest_that_fits_is_chosen(gpu, micro, recomputes):
    outcome = plan(request(gpu))
    assert isinstance(outcome, Plan)
    assert outcome.fits
    assert (outcome.batch.micro_batch_size, outcome.gradient_checkpointing) == (micro, recomputes)
    assert outcome.batch.global_batch_size == 16


def test_what_was_learned_of_a_gpu_counts_in_what_fits_and_not_in_what_is_predicted():
    asked = request("l4-24gb")
    plain, corrected = plan(asked), plan(replace(asked, correction=1.25))
    assert (plain.gradient_checkpointing, corrected.gradient_checkpointing) == (False, True)
    same = plan_of(replace(asked, correction=1.25), plain.batch, checkpointing=False)
    assert (plain.fits, same.fits) == (True, False)
    assert same.memory == plain.memory
    assert same.needed_bytes == pytest.approx(1.25 * plain.needed_bytes, abs=1)
    assert same.headroom == same.gpu.memory_bytes - same.needed_bytes


def test_recomputation_where_nothing_else_fits():
    outcome = plan(request("l4-24gb", dataset__maxLength=8192))
    assert isinstance(outcome, Plan)
    assert (outcome.batch.micro_batch_size, outcome.gradient_checkpointing) == (1, True)


def test_short_sequences_rather_recompute_than_dequantize_for_few_tokens():
    outcome = plan(request("rtx4090-24gb", dataset__maxLength=256, config=LLAMA_8B))
    assert isinstance(outcome, Plan)
    assert outcome.batch.micro_batch_size > 1


def test_no_choice_that_fits_is_faster():
    asked = request("a100-40gb")
    chosen = plan(asked)
    assert isinstance(chosen, Plan)
    for micro in (1, 2, 4):
        for again in (False, True):
            batch = BatchSplit(world_size=1, micro_batch_size=micro, gradient_accumulation_steps=16 // micro)
            other = plan_of(asked, batch, checkpointing=again)
            assert not other.fits or other.seconds_per_token.expected >= chosen.seconds_per_token.expected


@pytest.mark.parametrize(
    ("changes", "micro", "recomputes"),
    [
        pytest.param({"training__microBatchSize": 1}, 1, False, id="micro-batch"),
        pytest.param({"training__gradientCheckpointing": "Full"}, 4, True, id="checkpointing"),
        pytest.param({"training__gradientCheckpointing": "None"}, 4, False, id="no-checkpointing"),
        pytest.param({"training__globalBatchSize": 3}, 3, False, id="a-share-of-three"),
    ],
)
def test_what_the_job_says_is_kept(changes, micro, recomputes):
    outcome = plan(request("h100-80gb", **changes))
    assert isinstance(outcome, Plan)
    assert (outcome.batch.micro_batch_size, outcome.gradient_checkpointing) == (micro, recomputes)


def test_micro_batches_hold_no_more_tokens_than_help():
    outcome = plan(request("h200-141gb", dataset__maxLength=128, training__globalBatchSize=4096))
    assert isinstance(outcome, Plan)
    assert outcome.batch.micro_batch_size == 64


def test_rows_that_are_known_to_be_short_count_as_such():
    long = plan(request("l4-24gb", dataset__maxLength=8192))
    asked = request("l4-24gb", dataset__maxLength=8192)
    short = plan(PlanRequest(asked.spec, asked.shape, asked.gpu, 1, longest=1024))
    assert isinstance(long, Plan)
    assert isinstance(short, Plan)
    assert not short.gradient_checkpointing
    assert short.row == 1024


def test_a_global_batch_that_cannot_be_cut_is_named():
    with pytest.raises(FieldError, match=r"spec.training.globalBatchSize"):
        plan(request(world_size=3))


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        pytest.param({"dataset__maxLength": 262144}, {}, "more than the 131072 positions", id="positions"),
        pytest.param(
            {},
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "set INT8",
            id="quantized-otherwise",
        ),
        pytest.param(
            {},
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "nf4",
                }
            },
            "set false",
            id="not-doubly",
        ),
    ],
)
def test_a_base_that_does_not_suit_the_job_is_named(changes, config, message):
    with pytest.raises(FieldError, match=message):
        plan(request(config={**LLAMA_8B, **config}, **changes))


# ------------------------------------------------------------------------------------------------------- what would fit


def test_what_would_fit_is_said():
    asked = request("l4-24gb", config=LLAMA_70B)
    outcome = plan(asked)
    assert isinstance(outcome, NoFit)
    text = str(does_not_fit(asked, outcome))
    assert text.startswith('spec.model.source: "hf://org/base@main" needs ')
    assert "l4-24gb gives 22.0" in text
    assert "quantizedWeights 31.9" in text
    assert "a GPU such as a6000-48gb" in text


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        pytest.param(
            {"training__gradientCheckpointing": "None", "dataset__maxLength": 4096},
            "spec.training.gradientCheckpointing",
            id="recompute",
        ),
        pytest.param({"training__microBatchSize": 16}, "spec.training.microBatchSize", id="micro-batch"),
        pytest.param(
            {"quantization__type": "None", "dataset__maxLength": 16384}, "spec.quantization.type", id="quantize"
        ),
        pytest.param({"dataset__maxLength": 65536}, "spec.dataset.maxLength", id="shorter"),
        pytest.param({"lora__rank": 1024, "training__optimizer": "AdamW"}, "spec.lora.rank", id="rank"),
        pytest.param({"lora__rank": 512, "training__optimizer": "AdamW"}, "spec.training.optimizer", id="optimizer"),
    ],
)
def test_each_remedy_alone_makes_it_fit(changes, field):
    asked = request("l4-24gb", **changes)
    assert isinstance(plan(asked), NoFit)
    found = remedies(asked)
    assert field in [remedy.field for remedy in found]
    assert all(remedy.plan.fits for remedy in found)


def test_the_longest_sequences_that_fit_are_suggested():
    asked = request("l4-24gb", dataset__maxLength=65536)
    length = next(int(r.value) for r in remedies(asked) if r.field == "spec.dataset.maxLength")
    assert isinstance(plan(request("l4-24gb", dataset__maxLength=length)), Plan)
    assert isinstance(plan(request("l4-24gb", dataset__maxLength=length + 64)), NoFit)


def test_a_large_adapter_is_shared_among_ranks():
    asked = request("h100-80gb", world_size=8, lora__rank=256, training__optimizer="AdamW", config=LLAMA_70B)
    assert isinstance(plan(asked), NoFit)
    assert "spec.parallelism.zeroStage" in [remedy.field for remedy in remedies(asked)]


def test_notes_say_what_a_reader_would_not_expect():
    mixture = plan(request("h200-141gb", config=figures().MODELS["Mixtral-8x7B"], quantization__type="INT8"))
    assert isinstance(mixture, Plan)
    assert any("experts" in note for note in mixture.notes)
    shared = plan(request(world_size=2, parallelism__zeroStage=1))
    assert isinstance(shared, Plan)
    assert any("buckets for gradients, 0.3 GiB" in note for note in shared.notes)
