"""Known GPUs, their names, and what steps cost on them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_api.batch import BatchSplit
from qlora_api.errors import FieldError
from qlora_api.spec import ComputeType, QuantizationType
from qlora_api.status import MemoryComponent
from qlora_memory import (
    GPUS,
    Plan,
    cost,
    estimate,
    gpu_named,
    gpu_of_device,
    plan,
    run_of,
)
from qlora_memory.gpus import known_gpu
from qlora_memory.planning.remedies import changed

from .shapes import llama_8b, request, spec


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
