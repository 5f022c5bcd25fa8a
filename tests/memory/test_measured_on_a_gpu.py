"""The formulas against peaks that ``benchmarks/gpu/bench_memory_gpu.py`` saw on a GPU: ``benchmarks/measured``."""

from __future__ import annotations

import json

import pytest

from .shapes import figures

CASES = figures().measured_cases()


@pytest.mark.parametrize("seen", CASES, ids=lambda seen: json.dumps(seen.case).translate({ord(c): None for c in '"{}'}))
def test_a_peak_is_what_was_measured_and_no_more_was_needed(seen):
    assert abs(seen.error) < 0.015
    assert seen.in_use <= seen.memory.needed_bytes


def test_95_of_100_peaks_are_within_one_in_a_hundred():
    errors = sorted(abs(seen.error) for seen in CASES)
    assert len(errors) > 50
    assert errors[int(0.95 * len(errors))] < 0.01
