"""Processes of this machine, by number."""

from __future__ import annotations

import os


def is_alive(pid: int) -> bool:
    """Return whether there is a process of this number, whoever owns it."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
