"""Write times as Kubernetes' MicroTime. Pure."""

from __future__ import annotations

from datetime import datetime


def micro_time(now: datetime) -> str:
    """Return a time of UTC, such as 2026-01-01T00:00:00.000000Z."""
    return now.isoformat(timespec="microseconds").replace("+00:00", "Z")
