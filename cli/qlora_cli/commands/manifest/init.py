"""The command ``qlora init``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import program
from qlora_cli.text.choices import RowFormat
from qlora_cli.text.printable import write, write_line


def init(
    *,
    model: Annotated[str | None, typer.Option(metavar="SOURCE", help="Base model; asked for if not given.")] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="Training rows; asked for if not given.")] = None,
    destination: Annotated[
        str | None, typer.Option(metavar="URI", help="Destination of the adapter; asked for if not given.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the job; default: derived from the destination.")
    ] = None,
    form: Annotated[
        RowFormat | None,
        typer.Option("--format", help="Format of the rows; default: recognized by their columns, else Messages."),
    ] = None,
    credentials: Annotated[
        str | None, typer.Option(metavar="SECRET", help="Secret with the credentials for model, rows and destination.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CONFIG",
            help="Configuration of axolotl or LLaMA-Factory, or arguments of TRL's SFT script, to convert.",
        ),
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(min=1, max=16, metavar="N", help="Number of GPUs that the configuration of --from was made for."),
    ] = 1,
    file: Annotated[
        Path, typer.Option("--file", "-f", metavar="FILE", help="File to write; - for standard output.")
    ] = Path("job.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a manifest from three answers: model, data, destination.

    Optional fields are included as comments, with their defaults and descriptions.
    """
    with exit_with_code():
        from qlora_cli.kube.errors import ClusterError
        from qlora_cli.manifest import init as beginning
        from qlora_cli.manifest.convert import manifest as convert
        from qlora_cli.text import output as out
        from qlora_storage.local_paths import write_whole

        if str(file) != "-" and file.exists() and not force:
            raise ClusterError(f"--file {file}: is there already; --force replaces it, --file names another")
        given = {
            "model": model,
            "data": data,
            "destination": destination,
            "name": name,
            "format": form.value if form else None,
            "credentials": credentials,
        }
        ask = (lambda question: typer.prompt(question, err=True)) if sys.stdin.isatty() else None
        if source is not None:
            converted = convert.manifest_of(source, gpus, given, ask)
            text, places = converted.text, converted.places
            for note in converted.notes:
                write_line(f"note: {note}", error=True)
        else:
            answers = beginning.ask(given, ask)
            text, places = beginning.text(answers), (answers.model, answers.data, answers.destination)
        if str(file) == "-":
            write(text)
            return
        write_whole(file, text)
        write_line(f"{file} written")
        here = any("://" not in place for place in places)
        out.say_next(f"{program()} {'run' if here else 'submit'} {file}", f"{program()} explain spec")
