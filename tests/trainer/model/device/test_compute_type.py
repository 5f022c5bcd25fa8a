"""The compute type of a base is chosen by the device's hardware, by the job, by what the run began with."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from qlora_api import QLoRAJobSpec
from qlora_api.spec import ComputeType, QuantizationSpec, QuantizationType
from qlora_trainer.errors import UserError
from qlora_trainer.model.device import hardware
from qlora_trainer.model.device.compute_type import (
    best_type,
    device_problem,
    kept_type,
    resolved_on,
    slow_bf16_warning,
    with_compute_type,
)
from qlora_trainer.training.context import compute_type_of

AUTO, BFLOAT16, FLOAT16, FLOAT32 = ComputeType
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch):
    """Set what the GPU says of itself."""

    def set_to(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")

    return set_to


@pytest.fixture
def instructions(monkeypatch):
    """Set what the CPU has, and what oneDNN may use of it."""

    def set_to(*, x86=True, avx512_bf16=False, amx=False, onednn_bf16=False, onednn_fp16=False):
        monkeypatch.setattr(hardware, "_is_x86", lambda: x86)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(hardware, "_onednn", {"bf16": onednn_bf16, "fp16": onednn_fp16}.__getitem__)

    return set_to


class Together:
    """Ranks whose sums are of what each of them would say."""

    def __init__(self, *devices, device=None):
        self.device, self.world_size, self.is_first = device or devices[0], len(devices), True
        self._devices = devices

    def sum(self, *values):
        return [float(value) * self.world_size for value in values]

    def gather(self, value):
        return [value] * self.world_size


@pytest.mark.parametrize(
    ("of_the_gpu", "best"),
    [((7, 0), FLOAT16), ((7, 5), FLOAT16), ((8, 0), BFLOAT16), ((9, 0), BFLOAT16)],
)
def test_a_gpu_computes_in_what_its_tensor_cores_have(of_the_gpu, best, capability):
    capability(*of_the_gpu)
    assert best_type(Together(CUDA, CUDA)) is best
    assert resolved_on(QuantizationSpec(), CUDA).compute_type is best


@pytest.mark.parametrize(
    ("of_the_cpu", "best"),
    [
        pytest.param({}, FLOAT32, id="avx2"),
        pytest.param({"onednn_bf16": True}, FLOAT32, id="avx512-without-bf16"),
        pytest.param({"avx512_bf16": True, "onednn_bf16": True}, BFLOAT16, id="avx512-bf16"),
        pytest.param({"amx": True, "onednn_bf16": True}, BFLOAT16, id="amx"),
        pytest.param({"avx512_bf16": True}, FLOAT32, id="avx512-bf16-that-onednn-may-not-use"),
        pytest.param({"x86": False, "onednn_bf16": True}, BFLOAT16, id="arm-with-bf16"),
        pytest.param({"x86": False}, FLOAT32, id="arm-without-bf16"),
        pytest.param({"onednn_fp16": True}, FLOAT32, id="fp16-alone-needs-loss-scaling-for-no-gain"),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_it_has_instructions_for_it(of_the_cpu, best, instructions):
    instructions(**of_the_cpu)
    assert best_type(Together(CPU)) is best


@pytest.mark.parametrize(("bf16_ranks", "best"), [(2, BFLOAT16), (1, FLOAT32), (0, FLOAT32)])
def test_ranks_on_unlike_devices_take_what_all_of_them_have(bf16_ranks, best):
    ranks = SimpleNamespace(device=CPU, world_size=2, sum=lambda *_: [bf16_ranks, 0])
    assert best_type(ranks) is best


@pytest.mark.parametrize("began_with", [BFLOAT16, FLOAT16, FLOAT32])
@pytest.mark.parametrize("wanted", [AUTO, BFLOAT16, FLOAT16, FLOAT32])
def test_a_run_keeps_the_type_that_it_began_with(wanted, began_with):
    if wanted in (AUTO, began_with):
        assert kept_type(wanted, began_with) is began_with
        return
    with pytest.raises(UserError, match=f'computeType: "{wanted}" differs from {began_with}.*set {began_with} or Auto'):
        kept_type(wanted, began_with)


def test_a_checkpoint_of_a_version_that_names_no_type_is_bfloat16s():
    assert compute_type_of(SimpleNamespace(meta={})) is BFLOAT16
    assert compute_type_of(SimpleNamespace(meta={"compute_type": "Float32"})) is FLOAT32
    assert compute_type_of(None) is None


def test_float16_is_refused_on_a_cpu_without_its_arithmetic(instructions):
    instructions()
    problem = device_problem(QuantizationSpec(compute_type=FLOAT16), CPU)
    assert str(problem) == (
        'spec.quantization.computeType: "Float16" needs a GPU: this CPU has no float16 arithmetic; set Auto or Float32'
    )
    resumed = device_problem(QuantizationSpec(compute_type=FLOAT16), CPU, resumes=True)
    assert "resume this run, which began in it, on a GPU, or start a new run" in str(resumed)
    instructions(onednn_fp16=True)
    assert device_problem(QuantizationSpec(compute_type=FLOAT16), CPU) is None


def test_a_gpu_without_tensor_cores_is_refused(capability):
    capability(6, 1)
    assert "has compute capability 6.1; 7.0 or higher is needed" in str(device_problem(QuantizationSpec(), CUDA))


def test_int8_is_refused_where_auto_means_float16(capability):
    capability(7, 5)
    resolved = resolved_on(QuantizationSpec(type=QuantizationType.INT8), CUDA)
    assert 'spec.quantization.type: "INT8" is not available with Float16' in str(device_problem(resolved, CUDA))


def config_of(wanted):
    spec = QLoRAJobSpec.model_validate(
        {
            "model": {"source": "hf://a/model"},
            "dataset": {"train": {"source": "s3://a/rows.jsonl"}, "format": "Text"},
            "quantization": {"computeType": wanted},
            "training": {"epochs": 1},
            "output": {"destination": "s3://a/adapter"},
        }
    )
    return SimpleNamespace(spec=spec, model_copy=lambda update: SimpleNamespace(**update))


@pytest.mark.parametrize("wanted", [BFLOAT16, AUTO, FLOAT32])
def test_bfloat16_where_it_is_emulated_is_obeyed_with_a_warning_of_its_cost(wanted, instructions):
    instructions()
    resolved = with_compute_type(config_of(wanted), Together(CPU), None).spec.quantization
    assert resolved.compute_type is (FLOAT32 if wanted is AUTO else wanted)
    warning = slow_bf16_warning(resolved, CPU)
    if wanted is BFLOAT16:
        assert re.search(r"a matrix product takes [\d.]+ times as long as in Float32", warning)
    else:
        assert warning is None


def test_a_problem_of_one_rank_ends_all_of_them(instructions):
    instructions(avx512_bf16=True, onednn_bf16=True)
    other = ["spec.scheduling.nodeSelector", "a GPU", "has compute capability 6.1"]
    ranks = SimpleNamespace(device=CPU, world_size=2, is_first=True, gather=lambda own: [own, other])
    with pytest.raises(UserError, match=r'nodeSelector: "a GPU" has compute capability 6.1'):
        with_compute_type(config_of(BFLOAT16), ranks, None)
