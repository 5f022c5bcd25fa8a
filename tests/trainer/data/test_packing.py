from __future__ import annotations

import numpy as np
import pytest

from qlora_trainer.data.packing import pack, unpacked
from testing.call_counts import calls_of


def sizes(lengths, packs) -> list[int]:
    return [int(lengths[packs.rows(i)].sum()) for i in range(len(packs))]


@pytest.mark.parametrize("seed", range(25))
def test_packs_hold_each_row_once_and_never_overflow(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 300))
    lengths = rng.integers(1, capacity + 1, size=rng.integers(1, 400))
    packs = pack(lengths, capacity)
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))
    assert max(sizes(lengths, packs)) <= capacity
    assert packs.sums(lengths).tolist() == sizes(lengths, packs)
    # Best fit: no two packs could be one.
    two_emptiest = sorted(sizes(lengths, packs))[:2]
    assert len(packs) == 1 or sum(two_emptiest) > capacity


@pytest.mark.parametrize(
    ("lengths", "capacity", "want"),
    [
        pytest.param([5, 4, 3, 2, 1], 5, [[0], [1, 4], [2, 3]], id="perfect-fit"),
        pytest.param([2, 2, 2, 2], 4, [[0, 1], [2, 3]], id="equal-rows-keep-their-order"),
        pytest.param([1, 9], 10, [[0, 1]], id="rows-of-a-pack-in-the-order-of-the-set"),
        pytest.param([6, 5, 4], 10, [[0, 2], [1]], id="into-the-fullest-that-has-room"),
        pytest.param([7], 7, [[0]], id="as-long-as-the-pack"),
        pytest.param([], 7, [], id="nothing"),
    ],
)
def test_packs(lengths, capacity, want):
    packs = pack(np.array(lengths, dtype=np.int64), capacity)
    assert [packs.rows(i).tolist() for i in range(len(packs))] == want


@pytest.mark.parametrize("lengths", [pytest.param([3, 9], id="too-long"), pytest.param([0, 3], id="empty")])
def test_rows_that_fit_nowhere_are_refused(lengths):
    with pytest.raises(ValueError, match="do not fit sequences of 1 to 8"):
        pack(np.array(lengths), 8)


def many_lengths(count):
    return np.clip(np.random.default_rng(0).lognormal(5.5, 1, count).astype(np.int64), 1, 2048)


def test_the_work_of_packing_grows_little_faster_than_the_rows():
    few, many = (calls_of(lambda count=count: pack(many_lengths(count), 2048)) for count in (10_000, 80_000))
    assert many / few < 10  # eight times the rows; quadratic packing would be 64


def test_packing_is_deterministic_and_leaves_little_room():
    lengths = many_lengths(200_000)
    first, second = pack(lengths, 2048), pack(lengths, 2048)
    assert np.array_equal(first.members, second.members)
    assert lengths.sum() / (len(first) * 2048) > 0.99


def test_unpacked_rows_are_sequences_of_their_own():
    sequences = unpacked(3)
    assert [sequences.rows(i).tolist() for i in range(len(sequences))] == [[0], [1], [2]]
