"""Which ranks a machine gets."""

import pytest

from qlora_api.errors import FieldMistake
from qlora_cli.machine import Gpu, Machine, choose_world, look, visible

GPUS = tuple(Gpu(f"GPU-{letter}{n}", "NVIDIA H200", 141 << 30) for n, letter in enumerate("aabc"))


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
    assert (world.device, world.ranks, world.words) == want


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(FieldMistake, match="at most 4: one for each GPU"):
        choose_world(Machine(GPUS), 5)


def test_a_machine_can_be_asked_whatever_it_has():
    assert isinstance(look(), Machine)
