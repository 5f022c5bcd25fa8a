"""Times, sizes and steps in few characters, for tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

GIBIBYTE = 1024**3
_BARS = "▁▂▃▄▅▆▇█"


def short_time(seconds: float | None) -> str:
    """As kubectl writes ages: 45s, 12m, 3h20m, 2d4h."""
    if seconds is None:
        return ""
    whole = max(int(seconds), 0)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24}h" if days < 10 and hours % 24 else f"{days}d"
    if hours:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if minutes:
        return f"{minutes}m{whole % 60}s" if minutes < 10 and whole % 60 else f"{minutes}m"
    return f"{whole}s"


def age(then: datetime | None, now: datetime) -> str:
    return short_time((now - then).total_seconds()) if then else ""


def memory(count: int | None) -> str:
    """In GiB, as the operator writes it."""
    return "" if count is None else f"{count / GIBIBYTE:.1f}Gi"


def steps(step: int | None, total: int | None) -> str:
    if step is None:
        return ""
    return f"{step}/{total}" if total else str(step)


def rate(text: str) -> str:
    """Return a decimal of the API, rounded for a column."""
    try:
        value = float(text)
    except ValueError:
        return text
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def loss(text: str) -> str:
    """Return a loss with four decimals, so that columns stay aligned."""
    try:
        value = float(text)
    except ValueError:
        return text
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def plural(count: int, word: str) -> str:
    """``1 attempt``, ``2 attempts``."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def bar(step: int | None, total: int | None, width: int = 10) -> str:
    """``█████░░░░░``; empty where nothing is known."""
    if not total or step is None:
        return ""
    done = min(width, round(width * step / total))
    return "█" * done + "░" * (width - done)


def sparkline(values: list[float], width: int = 16) -> str:
    """Return the newest values as small bars."""
    shown = values[-width:]
    if len(shown) < 2:
        return ""
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in shown)


def task_result(task: Mapping[str, Any]) -> str:
    """Return what base and adapter reached in a task of spec.evaluate, such as ``acc 0.61 → 0.72 ± 0.012``."""
    error = f" ± {task['standardError']}" if task.get("standardError") else ""
    before = f"{task['base']} → " if task.get("base") else ""
    return f"{task.get('metric', '')} {before}{task.get('adapter', '')}{error} ({task.get('examples', 0)} examples)"
