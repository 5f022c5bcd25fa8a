"""Which commands there are, in the order in which '--help' lists them."""

from __future__ import annotations

import typer

from qlora_cli.cluster import commands, commands_more


def register(app: typer.Typer) -> None:
    """Add the commands for clusters."""
    for command in (
        commands_more.init,
        commands.submit,
        commands.list_jobs,
        commands.show,
        commands.watch,
        commands.logs,
        commands.events,
        commands.suspend,
        commands.resume,
        commands.cancel,
        commands.retry,
        commands_more.download,
        commands_more.verify,
        commands_more.merge,
        commands_more.compare,
        commands_more.upload,
        commands_more.doctor,
    ):
        app.command(command.__name__.removesuffix("_jobs"))(command)
