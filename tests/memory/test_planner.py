"""Choices of the planner, what would fit, and the fallbacks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_api.batch import BatchSplit
from qlora_api.errors import FieldError
from qlora_api.memory_fallback import Choice, next_smaller
from qlora_api.spec import ComputeType, Offload, QuantizationType
from qlora_api.status import MemoryComponent
from qlora_memory import (
    GPUS,
    NoFit,
    Plan,
    PlanRequest,
    cost,
    does_not_fit,
    estimate,
    gpu_named,
    gpu_of_device,
    model_shape,
    plan,
    plan_of,
    remedies,
    run_of,
    skipped_bytes,
)
from qlora_memory.gpus import known_gpu
from qlora_memory.planning.remedies import changed

from .shapes import LLAMA_8B, LLAMA_70B, figures, llama_8b, spec


def request(gpu="h100-80gb", world_size=1, config=None, **changes):
    fields = {"dataset__maxLength": 2048, "training__globalBatchSize": 16, **changes}
    return PlanRequest(spec(**fields), model_shape(config or LLAMA_8B), GPUS[gpu], world_size)


# --------------------------------------------------------------------------------------------------------- skipModules

WORST = ["layers.0.self_attn.v_proj", "model.layers.31.mlp.down_proj", "layers.1.*.o_proj"]


@pytest.mark.parametrize(
    ("kind", "saved"),
    [
        pytest.param("NF4", 0.5 + 1 / 64 + 4 / 64 / 256, id="NF4"),
        pytest.param("INT8", 1, id="INT8"),
    ],
)
def test_layers_that_stay_in_16_bits_take_two_bytes_a_weight(kind, saved):
    plain, skipping = (
        plan(request(quantization__type=kind, quantization__skipModules=names, quantization__computeType="BFloat16"))
        for names in ([], WORST)
    )
    asked = request(quantization__type=kind, quantization__skipModules=WORST).spec.quantization
    count, added = skipped_bytes(skipping.shape, asked)
    elements = 4096 * 1024 + 4096 * 14336 + 4096 * 4096
    assert count == 3
    assert added == pytest.approx((2 - saved) * elements, rel=1e-3)
    held = (
        MemoryComponent.QUANTIZED_WEIGHTS,
        MemoryComponent.QUANTIZATION_CONSTANTS,
        MemoryComponent.UNQUANTIZED_WEIGHTS,
    )
    more = sum(skipping.memory.components[part] - plain.memory.components[part] for part in held)
    assert more == pytest.approx(added, abs=3 * 5 * 512)


@pytest.mark.parametrize("stage", [0, 3])
def test_skipping_all_layers_but_one_needs_what_no_quantization_needs(stage):
    names = [f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up")]
    names += [f"layers.{index}.mlp.down_proj" for index in range(31)]
    sharing = {
        "parallelism__zeroStage": stage,
        "training__gradientCheckpointing": "Full",
        "training__microBatchSize": 1,
    }
    skipping = plan(request(world_size=2, quantization__skipModules=names, **sharing))
    plain = plan(request(world_size=2, quantization__type="None", **sharing))
    assert skipping.memory.peak_bytes == pytest.approx(plain.memory.peak_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        pytest.param("layers.99.mlp.down_proj", {}, "matches no layer that would be quantized", id="no-such-layer"),
        pytest.param("lm_head", {}, "head, norms and routers stay in 16 bits", id="head"),
        pytest.param("*", {}, "leaves no layer quantized", id="all"),
        pytest.param("experts.down_proj", {"quantization__type": "INT8"}, "experts, embeddings", id="experts-in-int8"),
    ],
)
def test_a_name_that_keeps_nothing_in_16_bits_is_refused(name, changes, reason):
    config = figures().MODELS["Mixtral-8x7B"] if "experts" in name else None
    with pytest.raises(FieldError, match=reason) as caught:
        plan(request(config=config, quantization__skipModules=[name], **changes))
    assert caught.value.field == "spec.quantization.skipModules"


# --------------------------------------------------------------------------------------------------------------- choice


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


# --------------------------------------------------------------------------------------------------------------- ladder


def choice(micro=4, accumulation=4, again=False, stage=0, world_size=1):
    batch = BatchSplit(world_size=world_size, micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    return Choice(batch, again, stage)


def walk(start, needed=None):
    found = []
    rung = next_smaller(start, needed)
    while rung is not None:
        found.append((rung.choice.batch.micro_batch_size, rung.choice.gradient_checkpointing, rung.choice.zero_stage))
        assert rung.choice.batch.global_batch_size == start.batch.global_batch_size
        rung = next_smaller(rung.choice, needed)
    return found


def test_the_way_down():
    assert walk(choice()) == [(2, False, 0), (1, False, 0), (1, True, 0)]
    assert walk(choice(micro=6, accumulation=1)) == [(3, False, 0), (1, False, 0), (1, True, 0)]
    assert walk(choice(micro=1, again=True)) == []


def test_sharing_only_where_it_helps():
    def shares_help(c):
        return 100 // (1 + c.zero_stage) - (5 if c.offload is Offload.OPTIMIZER else 0)

    start = choice(micro=1, again=True, world_size=4)
    assert walk(start, shares_help) == [(1, True, 1), (1, True, 2), (1, True, 3), (1, True, 3)]
    assert walk(start, lambda c: 100 + 10 * c.zero_stage) == []
    rung = next_smaller(start, shares_help)
    assert rung is not None
    assert not rung.resumes


def test_rungs_before_resume():
    rung = next_smaller(choice())
    assert rung is not None
    assert rung.resumes
    assert rung.change == "micro-batches of 2"


# -------------------------------------------------------------------------------------------------------- GPUs and cost


def test_a_gpu_that_is_not_known_is_answered_with_those_that_are():
    with pytest.raises(FieldError, match=r"--gpu: .* h100-80gb"):
        gpu_named("h100")
    assert gpu_named("H100-80GB").name == "h100-80gb"


@pytest.mark.parametrize(
    ("name", "close"),
    [
        pytest.param("h100", "did you mean h100-80gb or h100-pcie-80gb or h100-nvl-94gb?", id="no-memory"),
        pytest.param("NVIDIA-A100-SXM4-80GB", "did you mean a100-80gb?", id="label-of-feature-discovery"),
        pytest.param("4090", "did you mean rtx4090-24gb?", id="number-alone"),
        pytest.param("RTX 3090", "did you mean rtx3090-24gb?", id="with-a-space"),
        pytest.param("h10-80gb", "did you mean h100-80gb", id="misspelled"),
        pytest.param("mi300x", "is not known; there are b200", id="nothing-like-it"),
    ],
)
def test_a_gpu_that_is_not_known_is_answered_with_the_closest(name, close):
    with pytest.raises(FieldError) as caught:
        gpu_named(name)
    assert close in str(caught.value)


DEVICES = [
    ("NVIDIA B200", "b200-192gb"),
    ("NVIDIA H200", "h200-141gb"),
    ("NVIDIA H100 80GB HBM3", "h100-80gb"),
    ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
    ("NVIDIA H100 NVL", "h100-nvl-94gb"),
    ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
    ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
    ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
    ("NVIDIA A100 80GB PCIe", "a100-80gb"),
    ("NVIDIA L40S", "l40s-48gb"),
    ("NVIDIA L40", "l40-48gb"),
    ("NVIDIA RTX A6000", "a6000-48gb"),
    ("NVIDIA L4", "l4-24gb"),
    ("NVIDIA A10G", "a10g-24gb"),
    ("NVIDIA GeForce RTX 5090", "rtx5090-32gb"),
    ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
    ("NVIDIA GeForce RTX 3090", "rtx3090-24gb"),
    ("Tesla T4", "t4-16gb"),
    ("Tesla V100-SXM2-16GB", "v100-16gb"),
    ("Tesla V100-PCIE-32GB", "v100-32gb"),
    ("Tesla P100-PCIE-16GB", "p100-16gb"),
    ("Tesla P100-SXM2-16GB", "p100-16gb"),
    ("NVIDIA A100-SXM4-80GB-SHARED", "a100-80gb"),  # time-slicing, as feature discovery has it
    ("NVIDIA A100-SXM-64GB", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA GH200 480GB", None),
    ("NVIDIA GB200", None),
    ("NVIDIA H20", None),
    ("NVIDIA A10", None),
    ("NVIDIA L40S-24Q", None),
    ("NVIDIA T400", None),
    ("NVIDIA T400 4GB", None),
    ("NVIDIA RTX 6000 Ada Generation", None),
    ("NVIDIA GeForce RTX 3090 Ti", None),
    ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("", None),
]


@pytest.mark.parametrize("dashes", [False, True], ids=["nvml", "feature-discovery"])
@pytest.mark.parametrize(("device", "name"), DEVICES)
def test_devices_are_recognised(device, name, dashes):
    known = known_gpu(device.replace(" ", "-") if dashes else device)
    assert (known.name if known else None) == name


def test_every_gpu_of_the_table_is_recognised_by_some_name():
    assert {name for _, name in DEVICES} - {None} == set(GPUS)


@pytest.mark.parametrize(("device", "speed"), [("NVIDIA H100 80GB HBM3", "h100-80gb"), ("Tesla T4", "t4-16gb")])
def test_a_device_has_speeds_of_the_table_and_memory_of_its_own(device, speed):
    found = gpu_of_device(device, 123)
    assert (found.memory_bytes, found.tflops, found.hopper) == (123, GPUS[speed].tflops, GPUS[speed].hopper)


@pytest.mark.parametrize(
    ("gpu", "wanted", "planned"),
    [
        ("t4-16gb", "Auto", "Float16"),
        ("v100-16gb", "Auto", "Float16"),
        ("a100-40gb", "Auto", "BFloat16"),
        ("rtx5090-32gb", "Auto", "BFloat16"),
        ("t4-16gb", "Float32", "Float32"),
        ("t4-16gb", "BFloat16", "BFloat16"),
        ("h100-80gb", "Float16", "Float16"),
    ],
)
def test_auto_follows_the_gpu_and_a_named_compute_type_is_obeyed(gpu, wanted, planned):
    asked = request(gpu)
    found = plan(replace(asked, spec=changed(asked.spec, "quantization", compute_type=ComputeType(wanted))))
    assert isinstance(found, Plan)
    assert found.compute_type == planned
    emulated = any("no bf16 in hardware" in note for note in found.notes)
    assert emulated == (wanted == "BFloat16" and gpu == "t4-16gb")


def test_a_gpu_without_tensor_cores_is_refused_with_what_works():
    with pytest.raises(FieldError, match=r'nodeSelector: "p100-16gb" has compute capability 6.0; .*7.0'):
        plan(request("p100-16gb"))


def test_int8_is_refused_on_a_gpu_that_would_compute_it_in_float16():
    asked = request("t4-16gb")
    int8 = replace(asked, spec=changed(asked.spec, "quantization", type=QuantizationType.INT8))
    with pytest.raises(FieldError, match=r'spec.quantization.type: "INT8" is not available on t4-16gb'):
        plan(int8)


def test_without_flash_attention_keys_and_values_are_repeated_for_their_groups():
    asked, one = request(), BatchSplit(world_size=1, micro_batch_size=1, gradient_accumulation_steps=16)
    turing, ampere = (
        estimate(run_of(asked.spec, asked.shape, one, checkpointing=False, row=1024, gpu=GPUS[gpu]))
        for gpu in ("t4-16gb", "a100-40gb")
    )
    assert turing.components[MemoryComponent.ACTIVATIONS] > ampere.components[MemoryComponent.ACTIVATIONS]
    same = (MemoryComponent.QUANTIZED_WEIGHTS, MemoryComponent.UNQUANTIZED_WEIGHTS, MemoryComponent.ADAPTER_WEIGHTS)
    assert [turing.components[c] for c in same] == [ampere.components[c] for c in same]


def test_published_speeds_lie_within_what_is_expected():
    runs = [  # tokens/s of one GPU: fms-acceleration, torchtune; notes of docs/explanation/memory.md
        ("a100-80gb", 4096, 32768, True, 4105),
        ("rtx4090-24gb", 2048, 8192, True, 2413),
    ]
    from qlora_memory import AdapterShape
    from qlora_memory.planning.cost import seconds_per_token

    shape, quantization = llama_8b(), spec().quantization
    for gpu, row, tokens, again, measured in runs:
        adapter = AdapterShape(shape, spec().lora)
        span = seconds_per_token(shape, adapter, quantization, GPUS[gpu], row=row, tokens=tokens, recomputes=again)
        assert 1 / span.high < measured < 1.1 / span.low


def test_time_and_money():
    outcome = plan(request("h100-80gb"))
    assert isinstance(outcome, Plan)
    found = cost(outcome.seconds_per_token, tokens=100_000_000, gpus=4, price=2.0)
    assert found.gpu_hours.expected == pytest.approx(4 * found.hours.expected)
    assert found.money is not None
    assert found.money.expected == pytest.approx(2 * found.gpu_hours.expected)
    assert found.hours.low < found.hours.expected < found.hours.high
    assert cost(outcome.seconds_per_token, 1, 1, None).money is None
