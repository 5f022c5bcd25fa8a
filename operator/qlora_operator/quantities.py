"""Arithmetic with amounts as Kubernetes writes them: 500m, 4, 16Gi."""

from __future__ import annotations

import math
from decimal import Decimal


def times(quantity: str, count: int) -> str:
    """Return a quantity multiplied: 4 × "1.5Gi" is "6Gi", 3 × "500m" is "1500m"."""
    number, unit = _split(quantity)
    return f"{(Decimal(number) * count).normalize():f}{unit}"


def add(*quantities: str) -> str:
    """Add quantities of bytes, rounded up to a whole "Mi"."""
    return f"{math.ceil(sum(map(to_bytes, quantities)) / 2**20)}Mi"


def to_bytes(quantity: str) -> Decimal:
    number, unit = _split(quantity)
    if unit == "m":
        return Decimal(number) / 1000
    base = Decimal(1024 if unit.endswith("i") else 1000)
    return Decimal(number) * base ** ("KMGTPE".index(unit[0].upper()) + 1 if unit else 0)


def _split(quantity: str) -> tuple[str, str]:
    number = quantity.rstrip("EPTGMKikm")
    return number, quantity.removeprefix(number)
