"""The command ``qlora report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_on_user_error
from qlora_cli.text.printable import write_line

ReportOf = Annotated[
    str, typer.Argument(metavar="RUN", help="Name or folder of a local run, or folder of a published adapter.")
]


ReportFile = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--out",
        metavar="FILE",
        help="File to write; default: report.html in the folder of the run.",
        parser=o.to_path,
    ),
]


def report(run: ReportOf, out: ReportFile = None, runs_dir: o.RunsDir = Path("runs")) -> None:
    """Write an HTML report of a run or sweep on one page.

    Shows loss curves, memory, data, attempts and configuration. RUN is a local run, finished or not, or a published
    adapter. For a sweep it shows trials, important parameters and cost, prints these tables, and also writes the
    figures as JSON.
    """
    with exit_on_user_error():
        from qlora_cli.report.write import PAGE, write
        from qlora_cli.report.write_sweep import find_sweep, write_sweep
        from qlora_cli.text.output import console

        if (sweep := find_sweep(run, runs_dir)) is None:
            write_line(write(run, runs_dir, out))
            return
        page = out or sweep.path / PAGE
        figures, summary = write_sweep(sweep, page)
        console().print(summary, crop=False)
        write_line(f"{page}\n{figures}")
