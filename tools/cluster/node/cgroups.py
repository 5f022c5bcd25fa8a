"""Control groups of a node. They are the machine's, so that they outlive the node's processes unless removed."""

from __future__ import annotations

import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
REMOVE_SECONDS = 10
POLL_SECONDS = 0.05


def create(name: str) -> None:
    """Make a group of this name in every hierarchy (version 1) or in the only one (version 2)."""
    for hierarchy in _hierarchies():
        (hierarchy / name).mkdir(exist_ok=True)


def names(prefix: str) -> set[str]:
    """Groups at the top of a hierarchy whose name begins so."""
    return {path.name for hierarchy in _hierarchies() for path in hierarchy.glob(f"{prefix}*") if path.is_dir()}


def path(name: str) -> Path:
    """A group's folder, in the first hierarchy where there are several."""
    return _hierarchies()[0] / name


def remove(name: str) -> None:
    """Remove the groups with all below them. Their processes have ended; the kernel may still be at it.

    Raises:
        TimeoutError: a group stays.

    """
    deadline = time.monotonic() + REMOVE_SECONDS
    for hierarchy in _hierarchies():
        top = hierarchy / name
        while top.exists():
            for folder in (*sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True), top):
                try:
                    folder.rmdir()
                except OSError:
                    break
            else:
                continue
            if time.monotonic() > deadline:
                raise TimeoutError(f"control group {top} is still in use")
            time.sleep(POLL_SECONDS)


def _hierarchies() -> list[Path]:
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [path for path in ROOT.iterdir() if (path / "cgroup.procs").exists() and not path.is_symlink()]
