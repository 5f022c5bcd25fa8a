"""The command ``qlora explain``."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora_cli.commands.local_options import As, Output, exit_on_user_error

FieldPath = Annotated[
    str, typer.Argument(metavar="[FIELD]", help="Such as lora.rank or spec.dataset; default: the spec.")
]


def explain(field: FieldPath = "", output: As = Output.TEXT) -> None:
    """Explain a field of a QLoRAJob.

    Its type, default, bounds and meaning, whether it may change, and the rules it is part of.
    """
    with exit_on_user_error():
        from qlora_cli.local import run_view
        from qlora_cli.manifest import explain as explaining

        entry = explaining.describe(field)
        if output is Output.JSON:
            typer.echo(explaining.as_json(entry))
        else:
            run_view.console().print(explaining.show(entry))
