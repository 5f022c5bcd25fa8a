"""Partitions of any number of ranks, put together and cut for any other."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes import functional

from qlora_trainer.checkpoint.reshard import BLOCK, reshard


def padded(length, ranks):
    """Elements of each part, as DeepSpeed 0.19 pads: to a multiple of twice the ranks."""
    return math.ceil(length / (2 * ranks)) * 2


def parts_of(values, ranks):
    size = padded(len(values), ranks)
    whole = torch.cat([values, values.new_zeros(ranks * size - len(values))])
    return whole.split(size)


def quantized(part, name, number, *, signed):
    code = functional.create_dynamic_map(signed=signed)
    codes, state = functional.quantize_blockwise(part.contiguous(), code=code, blocksize=BLOCK)
    return {f"{name}.state{number}": codes, f"{name}.absmax{number}": state.absmax, f"{name}.qmap{number}": code}


def shards(ranks, weight, first, second, *, bits):
    """Return what each rank would have written."""
    parts = zip(parts_of(weight, ranks), parts_of(first, ranks), parts_of(second, ranks), strict=True)
    result = []
    for w, m, v in parts:
        state = {"0.0.weight": w, "numbers": torch.tensor([1])}
        if bits == 8:
            state |= quantized(m, "0.0", 1, signed=True) | quantized(v, "0.0", 2, signed=False)
        else:
            state |= {"0.0.exp_avg": m, "0.0.exp_avg_sq": v, "0.0.step": torch.tensor(7.0)}
        result.append(state)
    return result


def taken_up(saved, ranks, length):
    size = padded(length, ranks)
    return [reshard(saved.__getitem__, len(saved), rank, {"0.0": size}) for rank in range(ranks)]


def vectors(length):
    torch.manual_seed(length)
    return torch.randn(length), torch.randn(length) * torch.rand(length), torch.rand(length) ** 4


def joined(parts, name, length):
    return torch.cat([p[f"0.0.{name}"] for p in parts])[:length]


def dequantized(parts, number, length):
    values = [
        functional.dequantize_blockwise(
            p[f"0.0.state{number}"], absmax=p[f"0.0.absmax{number}"], code=p[f"0.0.qmap{number}"], blocksize=BLOCK
        )
        for p in parts
    ]
    return torch.cat(values)[:length]


@pytest.mark.parametrize(("was", "now"), [(4, 2), (2, 3), (3, 8), (1, 5), (5, 1), (16, 3), (2, 2)])
@pytest.mark.parametrize("length", [3, 1000, 4097])
def test_weights_and_32_bit_moments_are_cut_exactly(was, now, length):
    weight, first, second = vectors(length)
    parts = taken_up(shards(was, weight, first, second, bits=32), now, length)
    assert torch.equal(joined(parts, "weight", length), weight)
    assert torch.equal(joined(parts, "exp_avg", length), first)
    assert torch.equal(joined(parts, "exp_avg_sq", length), second)
    assert all(p["0.0.step"] == 7 and p["0.0.weight"].numel() == padded(length, now) for p in parts)


@pytest.mark.parametrize(("was", "now"), [(4, 2), (2, 8), (8, 1)])
def test_8_bit_moments_are_cut_exactly_where_parts_begin_at_blocks(was, now):
    length = 64 * BLOCK
    weight, first, second = vectors(length)
    saved = shards(was, weight, first, second, bits=8)
    parts = taken_up(saved, now, length)
    for name in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(joined(parts, name, length), joined(saved, name, length))


@pytest.mark.parametrize(("was", "now"), [(2, 3), (3, 2), (4, 3)])
def test_8_bit_moments_move_by_half_a_step_of_their_block_elsewhere(was, now):
    length = 64 * BLOCK + 10
    weight, first, second = vectors(length)
    saved = shards(was, weight, first, second, bits=8)
    parts = taken_up(saved, now, length)
    for number, bound in ((1, 0.007), (2, 0.004)):
        before, after = dequantized(saved, number, length), dequantized(parts, number, length)
        assert (before - after).abs().max() <= bound * before.abs().max()
        assert all(p[f"0.0.absmax{number}"].numel() == math.ceil(padded(length, now) / BLOCK) for p in parts)


def test_only_the_parts_that_a_rank_needs_are_read():
    weight, first, second = vectors(8000)
    saved = shards(8, weight, first, second, bits=32)
    asked = []

    def read(shard):
        asked.append(shard)
        return saved[shard]

    reshard(read, 8, 1, {"0.0": 4000})
    assert sorted(set(asked)) == [0, 4, 5, 6, 7]  # the first says how large parts are
