"""The command ``qlora init``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import program
from qlora_cli.text.choices import RowFormat
from qlora_cli.text.printable import write, write_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_api.errors import FieldError


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

    Optional fields are included as comments, with their defaults and descriptions. If the model folder and the rows
    are on this machine, notes list the fields that do not match them.
    """
    with exit_with_code():
        from qlora_cli.kube.errors import ClusterError
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
        text, places = _manifest(given, source, gpus)
        if str(file) == "-":
            write(text)
            return
        write_whole(file, text)
        write_line(f"{file} written")
        missing, unsuitable = _local_errors(text)
        for error in (*missing, *unsuitable):
            write_line(f"note: {error}", error=True)
        here = any("://" not in place for place in places)
        next_command = "validate" if unsuitable else "run" if here else "submit"
        out.say_next(f"{program()} {next_command} {file}", f"{program()} explain spec")


def _local_errors(text: str) -> tuple[list[FieldError], list[FieldError]]:
    """Return the paths that are not here, and the fields that the local model and rows do not suit."""
    from qlora_cli.manifest import local_paths, validate
    from qlora_cli.text import kubernetes_yaml

    manifests = [document.value for document in kubernetes_yaml.read(text, "the manifest")]
    missing = [error for manifest in manifests for error in local_paths.missing_paths(manifest)]
    return missing, [error for manifest in manifests for error in validate.content_errors(manifest)]


def _manifest(given: dict[str, str | None], source: Path | None, gpus: int) -> tuple[str, Sequence[str]]:
    """Return a manifest from answers, or from another tool's configuration, and the paths and URIs in it."""
    from qlora_cli.manifest import init as new_manifest
    from qlora_cli.manifest.convert import manifest as convert

    ask = (lambda question: typer.prompt(question, err=True)) if sys.stdin.isatty() else None
    if source is None:
        answers = new_manifest.ask(given, ask)
        return new_manifest.text(answers), (answers.model, answers.data, answers.destination)
    converted = convert.manifest_of(source, gpus, given, ask)
    for note in converted.notes:
        write_line(f"note: {note}", error=True)
    return converted.text, converted.places
