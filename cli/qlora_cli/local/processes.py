"""Processes of this machine, by number."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qlora_storage.local_paths import read_regular

if TYPE_CHECKING:
    from pathlib import Path

LOCK_BYTES = 64
"""Size of a lock file, which names at most two processes."""


def is_alive(pid: int) -> bool:
    """Return whether there is a process of this number, whoever owns it."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def in_use(folder: Path) -> bool:
    """Return whether a 'qlora run' or its trainer lives. The lock is not tried: that could turn a run away."""
    try:
        holders = read_regular(folder.parent / f".{folder.name}.lock", LOCK_BYTES).decode().split()
    except (OSError, UnicodeDecodeError):
        return False
    return any(pid.isdecimal() and is_alive(int(pid)) for pid in holders)
