"""Present the memory of one rank as components that add up to its peak."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_cli.text import units

if TYPE_CHECKING:
    from collections.abc import Mapping

PEAK = "peak"
Row = tuple[str, int | None, int | None]
"""Label, predicted bytes, measured bytes."""


def is_of_process(predicted: Mapping[str, int], device: str | None = None) -> bool:
    """Return whether the measured peak is that of a CPU's process, which holds Python and its libraries, too.

    ``device``: of the run, where it is known. Only for a GPU is the peak itself predicted.
    """
    return device == "CPU" if device else bool(predicted) and PEAK not in predicted


def memory_rows(predicted: Mapping[str, int], measured: Mapping[str, int], device: str | None = None) -> list[Row]:
    """Return a row for each component, the largest first, for the rest of the peak, and for the peak."""
    of_process = is_of_process(predicted, device)
    names = sorted(
        (name for name in {**predicted, **measured} if name != PEAK),
        key=lambda name: -(measured.get(name) or predicted.get(name) or 0),
    )
    rows: list[Row] = [(units.spaced(name), predicted.get(name), measured.get(name)) for name in names]
    peak = measured.get(PEAK)
    apart = sum(size for name, size in measured.items() if name != PEAK)
    if peak is not None and apart and peak > apart:
        rows.append(("Python, libraries, activations" if of_process else "not measured separately", None, peak - apart))
    whole = sum(predicted.values()) if of_process and predicted else predicted.get(PEAK)
    if of_process and whole is not None:
        rows.append(("all tensors", whole, None))
        whole = None
    if whole is not None or peak is not None:
        rows.append(("peak of the process (CPU)" if of_process else PEAK, whole, peak))
    return rows


def memory_words(predicted: Mapping[str, int], measured: Mapping[str, int], device: str) -> str:
    """Return the measured memory in one sentence, such as ``peak 3.00 GiB: quantized weights 1.00 GiB · …``."""
    rows = [(label, size) for label, _, size in memory_rows(predicted, measured, device) if size]
    if not rows:
        return ""
    parts = [f"{label} {units.size(size)}" for label, size in rows]
    if PEAK not in measured:
        return "Memory of a rank: " + " · ".join(parts)
    return f"Memory of a rank, {parts[-1]}" + (": " + " · ".join(parts[:-1]) if parts[:-1] else "")
