"""The command ``qlora inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_on_user_error
from qlora_cli.text.choices import PlainOutputFormat
from qlora_cli.text.printable import as_json, write_line

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Base model in 16 bits: a folder, hf://org/name or s3://…, as in spec.model.source."
    ),
]


Skip = Annotated[int, typer.Option("--skip", min=0, metavar="N", help="Number of layers to print as skipModules.")]


Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write an HTML page to this file.")]


def inspect(model: Model, *, skip: Skip = 3, html: Html = None, output: o.PlainOutput = PlainOutputFormat.TEXT) -> None:
    """Measure the quantization error of each layer of a base model.

    Compares NF4, FP4 and INT8, without data, and prints the layers with the largest errors as skipModules to paste
    into a job. Runs the trainer (the extra "trainer" of qlora-operator); holds one layer in memory at a time.
    """
    with exit_on_user_error():
        from qlora_cli.inspection import view
        from qlora_cli.inspection.measure import InspectionError, measure
        from qlora_cli.inspection.page import page
        from qlora_cli.local.trainer_process import Commands, require_trainer
        from qlora_cli.text import output as out
        from qlora_storage.local_paths import write_whole

        require_trainer("qlora inspect")
        try:
            found = measure(model, out.console(stderr=True), Commands())
        except InspectionError as error:
            write_line(error, error=True)
            raise typer.Exit(error.exit_code) from None
        if html is not None:
            html.parent.mkdir(parents=True, exist_ok=True)
            write_whole(html, page(found, skip))
        if output is PlainOutputFormat.JSON:
            write_line(as_json(view.as_dict(found, skip)))
        else:
            out.console().print(view.show(found, skip))
