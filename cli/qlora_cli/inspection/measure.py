"""Run the trainer's process that measures a base, and show how far it is."""

from __future__ import annotations

import json
import subprocess
import tempfile
from typing import IO, TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_api.contract import ExitCode
from qlora_cli.inspection.inspected_layers import InspectedLayer, Inspection, sorted_by_name
from qlora_cli.local.trainer_process import environment, shell_code, tail

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from qlora_cli.local.trainer_process import Commands


class InspectionError(ValueError):
    """The trainer's process failed; ``str()`` says why."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def measure(model: str, console: Console, commands: Commands) -> Inspection:
    """Measure a base, with a progress bar on a terminal.

    Raises:
        InspectionError: the trainer's process failed.

    """
    layers: list[InspectedLayer] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with tempfile.TemporaryFile("w+", errors="replace") as errors, bar as progress:
        task = progress.add_task("reading the base", total=None)
        process = subprocess.Popen(
            [*commands.inspect, f"--model={model}"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=environment(),
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
            raise _failure(shell_code(process.returncode), tail(errors))
    return Inspection(model, sorted_by_name(layers))


def _failure(code: int, lines: list[str]) -> InspectionError:
    """Return the error of a failed process: the sentence of a user's error alone, else the end of standard error."""
    if code == ExitCode.USER_ERROR and lines:
        return InspectionError(lines[-1], code)
    return InspectionError("\n".join([*lines, f"The trainer ended with exit code {code}."]), code)


def _lines(stdout: IO[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the lines that are the trainer's; libraries print others."""
    for line in stdout or ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and ("layers" in value or "name" in value):
            yield value
