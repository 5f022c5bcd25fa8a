"""The command ``qlora validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_on_user_error
from qlora_cli.text.choices import PlainForm
from qlora_cli.text.printable import write_line

Jobs = Annotated[list[Path], typer.Argument(metavar="JOB.yaml...", help="Manifests; - reads standard input.")]


def validate(jobs: Jobs, output: o.PlainOutput = PlainForm.TEXT) -> None:
    """Check manifests as the API server would.

    A model folder and rows that are on this machine are looked at, too. Prints every error with file and line; the exit
    code is 40 if there is one.
    """
    with exit_on_user_error():
        from qlora_cli.manifest import validate as check

        reports = [check.check_file(path) for path in jobs]
        write_line(check.as_json(reports) if output is PlainForm.JSON else check.as_text(reports))
    raise typer.Exit(0 if all(report.good for report in reports) else o.USER_ERROR)
