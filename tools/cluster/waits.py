"""Waiting for what no watch announces."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SOON = 15
"""Seconds in which what happened unseen is found out."""
POLL_SECONDS = 0.05


def eventually(holds: Callable[[], object], seconds: float = SOON) -> bool:
    """Return whether something holds within a time."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return bool(holds())
