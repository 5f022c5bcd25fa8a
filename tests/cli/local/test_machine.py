"""Ranks that a machine gets."""

from types import SimpleNamespace

import pynvml
import pytest

from qlora_api.errors import FieldError
from qlora_cli.local.machine import LocalGpu, Machine, choose_world, look, visible

GPUS = tuple(LocalGpu(f"GPU-{letter}{n}", "NVIDIA H200", 141 << 30) for n, letter in enumerate("aabc"))


@pytest.mark.parametrize(
    ("setting", "want"),
    [
        pytest.param(None, [0, 1, 2, 3], id="not-set"),
        pytest.param("", [], id="empty-hides-all"),
        pytest.param("-1", [], id="minus-one-hides-all"),
        pytest.param("2,0", [2, 0], id="order-counts"),
        pytest.param("0,9,1", [0], id="the-first-unknown-ends-the-list"),
        pytest.param("0,0", [0], id="twice-ends-the-list"),
        pytest.param("GPU-b", [2], id="uuid-prefix"),
        pytest.param("GPU-a", [], id="ambiguous-prefix"),
        pytest.param(" 1 , 3", [1, 3], id="blanks"),
    ],
)
def test_cuda_visible_devices(setting, want):
    assert visible(GPUS, setting) == tuple(GPUS[n] for n in want)


@pytest.mark.parametrize(
    ("machine", "ranks", "want"),
    [
        pytest.param(Machine(GPUS), None, ("CUDA", 4, "4 × NVIDIA H200 (141.00 GiB)"), id="all-gpus"),
        pytest.param(Machine(GPUS), 2, ("CUDA", 2, "2 × NVIDIA H200 (141.00 GiB)"), id="some-gpus"),
        pytest.param(Machine(), None, ("CPU", 2, "2 CPU processes, no GPU"), id="cpu"),
        pytest.param(Machine(), 1, ("CPU", 1, "1 CPU process, no GPU"), id="one-cpu"),
    ],
)
def test_worlds(machine, ranks, want):
    world = choose_world(machine, ranks)
    assert (world.device, world.ranks, world.description) == want


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(FieldError, match="at most 4: one for each GPU"):
        choose_world(Machine(GPUS), 5)


def test_a_machine_can_be_asked_whatever_it_has():
    assert isinstance(look(), Machine)


@pytest.fixture
def nvml(monkeypatch):
    """NVML on a machine with two GPUs."""
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: f"GPU-{handle}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "NVIDIA H200")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(total=141 << 30))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_all_gpus_are_found(nvml):
    assert look() == Machine(tuple(LocalGpu(f"GPU-{n}", "NVIDIA H200", 141 << 30) for n in (0, 1)))


def test_hidden_gpus_are_named(nvml):
    nvml.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [g.uuid for g in look().gpus] == ["GPU-1"]
    assert look().note == "CUDA_VISIBLE_DEVICES hides 1 of 2 GPUs"


@pytest.mark.parametrize(
    ("code", "note"),
    [
        pytest.param(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "", id="no-driver-is-no-news"),
        pytest.param(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "NVML does not answer", id="a-broken-driver-is"),
    ],
)
def test_machines_without_a_driver_that_works(nvml, code, note):
    def fail():
        raise pynvml.NVMLError(code)

    nvml.setattr(pynvml, "nvmlInit", fail)
    assert look().gpus == ()
    assert look().note.startswith(note)
    assert bool(look().note) == bool(note)
