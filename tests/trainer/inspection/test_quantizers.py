"""Formulas of quantization, checked against values computed by hand and against bitsandbytes."""

from __future__ import annotations

from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_trainer.inspection.quantizers import (
    BLOCK_SIZES,
    affine,
    affine_constants,
    block_errors,
    code_finder,
    codes,
    int8_error,
    linear_errors,
    quantize_constants,
    symmetric,
    symmetric_scale,
)

ROW = torch.tensor([[-1.4, 0.6, 0.22, 1.0]])
SHIFTED = torch.tensor([[-0.5, 1.0, 0.22, 0.0]])


def test_symmetric_integers_divide_by_the_absmax():
    """1.4 / 7 = 0.2: -7, 3, 1.1 → 1, 5."""
    assert symmetric_scale(ROW, 4).item() == pytest.approx(0.2)
    assert torch.allclose(symmetric(ROW, 4), torch.tensor([[-1.4, 0.6, 0.2, 1.0]]))
    assert linear_errors(ROW.view(-1), 4)[0] == pytest.approx(0.02**2, rel=1e-5)


def test_asymmetric_integers_have_a_zero_point():
    """(1.0 + 0.5) / 15 = 0.1, zero point 0.5 / 0.1 = 5: 0, 15, 2.2 + 5 → 7, 5."""
    step, zero = affine_constants(SHIFTED, 4)
    assert (step.item(), zero.item()) == (pytest.approx(0.1), 5)
    assert torch.allclose(affine(SHIFTED, 4), torch.tensor([[-0.5, 1.0, 0.2, 0.0]]), atol=1e-6)
    assert linear_errors(SHIFTED.view(-1), 4)[1] == pytest.approx(0.02**2, rel=1e-4)


def test_the_range_of_asymmetric_integers_includes_0():
    step, zero = affine_constants(torch.tensor([[3.0, 1.5], [-3.0, -1.5]]), 4)
    assert step.view(-1).tolist() == pytest.approx([0.2, 0.2])
    assert zero.view(-1).tolist() == [0, 15]


def test_the_codes_of_nf4_are_quantiles_of_the_normal_distribution():
    """QLoRA, section 3 and appendix E: 8 quantiles above 0, 0 itself, and 7 below, divided by the largest."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(offset - i * (offset - 0.5) / 8) for i in range(8)]
    below = [-quantile(offset - i * (offset - 0.5) / 7) for i in range(7)]
    want = sorted(value / above[0] for value in (*above, 0, *below))
    assert codes("nf4").tolist() == pytest.approx(want, abs=1e-5)
    assert codes("nf4")[1].item() == pytest.approx(-0.6961928)


def test_the_codes_of_fp4_have_one_bit_of_mantissa():
    positive = [1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1]
    assert codes("fp4").tolist() == pytest.approx(sorted([*positive, 0, 0, *(-v for v in positive)]), abs=1e-6)


def test_a_block_of_nf4_is_its_absmax_times_codes():
    """Absmax 2: 1, -0.5, 0.15, 0 → 1, -0.52507, 0.16093, 0."""
    found = block_errors(torch.tensor([2.0, -1.0, 0.3, 0.0]), 4, "nf4")
    assert found.absmax.tolist() == [2]
    assert found.squared_error() == pytest.approx((2 * 0.5250730514 - 1) ** 2 + (2 * 0.1609302014 - 0.3) ** 2, rel=1e-5)
    restored = 2.1 * torch.tensor([1, -0.5250730514, 0.1609302014, 0])
    error = (restored - torch.tensor([2.0, -1.0, 0.3, 0.0])).square().sum()
    assert found.squared_error(torch.tensor([2.1])) == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_nearest_code_is_taken(kind):
    table = codes(kind).unique()
    middles = (table[1:] + table[:-1]) / 2
    values = torch.cat([torch.linspace(-1, 1, 10001), middles * (1 + 1e-6), middles * (1 - 1e-6)])
    want = table[(values[:, None] - table[None]).abs().argmin(dim=1)]
    assert torch.equal(code_finder(kind, values.device).nearest(values), want)


def test_int8_divides_each_row_by_its_absmax():
    """Row 1: 127 → step 1: 127, -1, 0.25 → 0. Row 2: 63.5 → step 0.5: 127, 0.75 / 0.5 = 1.5 → 2, 0."""
    assert int8_error(torch.tensor([[127, -1, 0.25], [63.5, 0.75, 0]])) == pytest.approx(0.25**2 + 0.25**2)


def test_double_quantization_takes_the_mean_off_and_8_bits_of_the_rest():
    absmax = torch.rand(1000) + 1
    found = quantize_constants(absmax)
    assert found.offset == pytest.approx(absmax.mean().item())
    assert 0 < (found.restored - absmax).abs().max() < 0.02


def test_zeros_stay_zeros():
    zeros = torch.zeros(100)
    assert block_errors(zeros, 64, "nf4").squared_error() == 0
    assert linear_errors(zeros, 64) == (0, 0)
    assert int8_error(zeros.view(4, 25)) == 0


@pytest.mark.parametrize("size", [256, 640, 1000])
@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_block_errors_are_those_of_bitsandbytes(kind, block, size):
    weights = torch.randn(size, generator=torch.Generator().manual_seed(1))
    packed, state = bnb.quantize_4bit(weights, blocksize=block, quant_type=kind)
    want = (bnb.dequantize_4bit(packed, state) - weights).norm() / weights.norm()
    found = block_errors(weights, block, kind)
    assert torch.equal(found.absmax, state.absmax)
    assert (found.squared_error() ** 0.5) / weights.norm() == pytest.approx(want.item(), abs=1e-6)
