"""Paths on this machine, as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand_home(path: str) -> Path:
    """Return a path with the home that ``~`` or ``~user`` stands for; as it is where there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 Path.expanduser raises a RuntimeError there
