"""Numbers as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Return a size with a binary unit: ``1.5 GiB``."""
    unit = 0
    while count >= 1024 and unit < len(_SIZES) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} {_SIZES[unit]}" if unit < 2 else f"{count:.2f} {_SIZES[unit]}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: ``2 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def number(value: float) -> str:
    """Return a count with separators, or a rate with as many digits as say something."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def large_number(count: int) -> str:
    """``8.03 billion``, ``4.26 million``."""
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.2f} million"


def spaced(camel: str) -> str:
    """``quantizedWeights`` as ``quantized weights``."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in camel)


def listing(names: Sequence[str]) -> str:
    """``a, b and c``."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def lengths(found: Mapping[int, int]) -> str:
    """Return a histogram by powers of two, in one line."""
    return ", ".join(f"≤ {number(most)}: {number(count)}" for most, count in sorted(found.items()))
