"""The command ``qlora upload``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import program
from qlora_cli.text.printable import write


def upload(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="File or folder.")],
    target: Annotated[str, typer.Argument(metavar="URI", help="Destination: s3://bucket/key, gs://… or az://….")],
) -> None:
    """Copy rows or a model into object storage, for pods to read.

    Takes credentials for object storage from the environment.
    """
    with exit_with_code():
        from qlora_cli.artifacts import storage
        from qlora_cli.text import output as out

        uris = storage.upload(source, target)
        write("".join(f"{uri}\n" for uri in uris))
        out.say_next(f"{program()} submit JOB.yaml")
