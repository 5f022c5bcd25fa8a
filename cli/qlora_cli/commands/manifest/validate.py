"""The command ``qlora validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.exit_codes import USER_ERROR
from qlora_cli.commands.options import exit_on_user_error
from qlora_cli.text.choices import PlainOutputFormat
from qlora_cli.text.printable import write_line

Jobs = Annotated[list[Path], typer.Argument(metavar="JOB.yaml", help="Manifests; - for standard input.")]


def validate(jobs: Jobs, output: o.PlainOutput = PlainOutputFormat.TEXT) -> None:
    """Check manifests as the API server would.

    Prints every error with file and line. Also checks each job against the model folder and the rows that it names, if
    they are on this machine.
    """
    with exit_on_user_error():
        from qlora_cli.manifest import validate as check

        reports = [check.check_file(path) for path in jobs]
        write_line(check.as_json(reports) if output is PlainOutputFormat.JSON else check.as_text(reports))
    raise typer.Exit(0 if all(report.good for report in reports) else USER_ERROR)
