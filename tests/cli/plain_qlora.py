"""The command line as a process without root's rights over files."""

from __future__ import annotations

import importlib
import os
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

import qlora_cli
from qlora_cli.app import app
from testing.plain_process import run_plainly

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testing.plain_process import ProcessResult


def qlora(line: str, stdout: int | None = None, closed: Sequence[int] = (), **environment: str) -> ProcessResult:
    """Run a command line; ``stdout`` is a file descriptor in place of the output that is returned.

    The standard streams of the numbers ``closed`` are closed.
    """
    _import_all()
    environment = {"TERM": "xterm-256color", "PATH": os.environ["PATH"], **environment}
    return run_plainly(lambda words: app(list(words), prog_name="qlora"), line.split(), environment, stdout, closed)


@cache
def _import_all() -> None:
    """Import all commands, so that forks do not."""
    for module in pkgutil.walk_packages(qlora_cli.__path__, "qlora_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
