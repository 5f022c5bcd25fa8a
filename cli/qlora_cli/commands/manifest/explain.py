"""The command ``qlora explain``."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_on_user_error
from qlora_cli.text.choices import PlainOutputFormat
from qlora_cli.text.printable import write_line

FieldPath = Annotated[
    str, typer.Argument(metavar="FIELD", help="Path of a field, such as lora.rank or spec.dataset; default: spec.")
]


def explain(field: FieldPath = "", output: o.PlainOutput = PlainOutputFormat.TEXT) -> None:
    """Explain a field of a QLoRAJob.

    Prints its type, default, bounds and meaning, whether it can be changed, and the rules that apply to it.
    """
    with exit_on_user_error():
        from qlora_cli.manifest import explain as explaining
        from qlora_cli.text.output import console

        entry = explaining.describe(field)
        if output is PlainOutputFormat.JSON:
            write_line(explaining.as_json(entry))
        else:
            console().print(explaining.show(entry))
