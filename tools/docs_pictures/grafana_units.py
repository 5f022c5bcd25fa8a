"""Numbers as Grafana writes them, for the units that the dashboards use."""

from __future__ import annotations

from collections.abc import Sequence

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("", " K", " Mil", " Bil", " Tri")
_TIMES: Sequence[tuple[float, str]] = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))


def in_words(value: float, unit: str, decimals: int | None = None) -> str:
    """A value with its unit."""
    match unit:
        case "bytes" | "Bps":
            return _scaled(value, 1024, _BINARY) + ("/s" if unit == "Bps" else "")
        case "percentunit":
            return f"{value * 100:.{decimals if decimals is not None else _digits(value * 100)}f}%"
        case "s":
            size, name = next(((s, n) for s, n in _TIMES if abs(value) >= s), (1, "s"))
            return f"{value / size:.3g} {name}"
        case "currencyUSD":
            return f"${value:,.2f}"
        case "h":
            return f"{value:.3g} h"
        case "sci":
            return f"{value:.1e}" if value else "0"
        case "none":
            return f"{value:.{decimals}f}" if decimals is not None else f"{value:.6g}"
        case "watt":
            return f"{value:.0f} W"
        case "reqps" | "ops":
            return f"{value:.3g}/s"
        case _:
            return _scaled(value, 1000, _DECIMAL)


def _scaled(value: float, base: int, names: Sequence[str]) -> str:
    index = 0
    while abs(value) >= base and index < len(names) - 1:
        value, index = value / base, index + 1
    name = names[index]
    return f"{value:.3g}{'' if name.startswith(' ') or not name else ' '}{name}".rstrip()


def _digits(percent: float) -> int:
    return 0 if percent in (0, 100) or abs(percent) >= 10 else 1 if abs(percent) >= 1 else 2
