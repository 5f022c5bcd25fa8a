from __future__ import annotations

import pytest

from qlora_operator.quantities import add, times


@pytest.mark.parametrize(
    ("quantity", "count", "product"),
    [
        ("1.5Gi", 4, "6Gi"),
        ("500m", 3, "1500m"),
        ("4", 8, "32"),
        ("1Ki", 2, "2Ki"),
        ("25", 4, "100"),
        ("33554433Ki", 8, "268435464Ki"),
        ("0.1", 3, "0.3"),
    ],
)
def test_quantities_multiply(quantity, count, product):
    assert times(quantity, count) == product


@pytest.mark.parametrize(
    ("quantities", "total"),
    [
        (("1Gi", "1Mi"), "1025Mi"),
        (("1G",), "954Mi"),  # rounded up
        (("1", "1000m"), "1Mi"),
        (("0.5Ti", "1Ki"), "524289Mi"),
        (("1k", "1M", "1T"), "953676Mi"),
    ],
)
def test_quantities_of_bytes_add_up_in_whole_mebibytes(quantities, total):
    assert add(*quantities) == total
