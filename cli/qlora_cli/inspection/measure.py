"""Run the trainer's process that measures a base, and show how far it is."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import tempfile
from typing import IO, TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_api.contract import ExitCode
from qlora_cli.inspection.layers import InspectedLayer, Inspection, sorted_by_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from qlora_cli.local.trainer_process import Commands

TAIL_LINES = 20


class InspectionError(ValueError):
    """A base cannot be inspected; ``str()`` says why."""


def measure(model: str, console: Console, commands: Commands) -> Inspection:
    """Measure a base, with a progress bar on a terminal.

    Raises:
        InspectionError: the trainer is not installed, or it failed.

    """
    if importlib.util.find_spec("qlora_trainer") is None or importlib.util.find_spec("torch") is None:
        raise InspectionError("qlora inspect needs the trainer: pip install 'qlora-operator[trainer]'")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    layers: list[InspectedLayer] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with tempfile.TemporaryFile("w+") as errors, bar as progress:
        task = progress.add_task("reading the base", total=None)
        process = subprocess.Popen(
            [*commands.inspect, f"--model={model}"], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        with process:
            for line in _lines(process.stdout):
                if "layers" in line:
                    progress.update(task, total=line["layers"])
                else:
                    layer = InspectedLayer.model_validate(line)
                    layers.append(layer)
                    progress.update(task, advance=1, description=layer.name)
        if process.returncode:
            errors.seek(0)
            tail = errors.read().strip().splitlines()[-TAIL_LINES:]
            raise InspectionError("\n".join(tail[-1:] if process.returncode == ExitCode.USER_ERROR else tail))
    return Inspection(model, sorted_by_name(layers))


def _lines(stdout: IO[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the lines that are the trainer's; libraries print others."""
    for line in stdout or ():
        if line.startswith("{"):
            yield json.loads(line)
