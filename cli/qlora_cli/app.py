"""The command line ``qlora``: all commands, in the order in which '--help' lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora_cli.commands.artifacts.compare import compare
from qlora_cli.commands.artifacts.download import download
from qlora_cli.commands.artifacts.generate import generate
from qlora_cli.commands.artifacts.merge import merge
from qlora_cli.commands.artifacts.report import report
from qlora_cli.commands.artifacts.verify import verify
from qlora_cli.commands.command_group import Command, CommandGroup
from qlora_cli.commands.doctor import doctor
from qlora_cli.commands.inspect import inspect
from qlora_cli.commands.jobs.cancel import cancel
from qlora_cli.commands.jobs.events import events
from qlora_cli.commands.jobs.list import list_jobs
from qlora_cli.commands.jobs.logs import logs
from qlora_cli.commands.jobs.resume import resume
from qlora_cli.commands.jobs.retry import retry
from qlora_cli.commands.jobs.show import show
from qlora_cli.commands.jobs.submit import submit
from qlora_cli.commands.jobs.suspend import suspend
from qlora_cli.commands.jobs.watch import watch
from qlora_cli.commands.manifest.crds import crds
from qlora_cli.commands.manifest.explain import explain
from qlora_cli.commands.manifest.init import init
from qlora_cli.commands.manifest.plan import plan
from qlora_cli.commands.manifest.validate import validate
from qlora_cli.commands.run import run
from qlora_cli.commands.sweep import sweep
from qlora_cli.commands.upload import upload

app = typer.Typer(
    name="qlora",
    cls=CommandGroup,
    help="Fine-tune language models with QLoRA, on this machine or in a Kubernetes cluster.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would double the time it takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"qlora {version('qlora-operator')}")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models with QLoRA, on this machine or in a Kubernetes cluster."""


for _command in (
    run,
    sweep,
    validate,
    plan,
    inspect,
    explain,
    crds,
    generate,
    report,
    init,
    submit,
    list_jobs,
    show,
    watch,
    logs,
    events,
    suspend,
    resume,
    cancel,
    retry,
    download,
    verify,
    merge,
    compare,
    upload,
    doctor,
):  # in the order in which '--help' lists them
    app.command(_command.__name__.removesuffix("_jobs"), cls=Command)(_command)
