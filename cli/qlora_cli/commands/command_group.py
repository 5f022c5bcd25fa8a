"""The group of all commands: what the system refuses ends each of them in a sentence.

It also answers the verbs of kubectl and of other tools with the command of ``qlora`` that does it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from qlora_cli.commands.exit_codes import STORAGE_FAILED, USER_ERROR, exit_codes
from qlora_cli.commands.standard_streams import prepare_streams
from qlora_cli.text.printable import write_line

_LIST = ("list", "show JOB")
INSTEAD: dict[str, tuple[str, ...]] = {
    "get": _LIST,
    "ls": _LIST,
    "ps": _LIST,
    "status": ("show JOB", "watch"),
    "describe": ("show JOB", "events JOB"),
    "top": ("watch",),
    "apply": ("submit JOB.yaml",),
    "create": ("init", "submit JOB.yaml"),
    "new": ("init",),
    "train": ("run JOB.yaml", "submit JOB.yaml"),
    "start": ("run JOB.yaml", "submit JOB.yaml"),
    "delete": ("cancel JOB",),
    "rm": ("cancel JOB",),
    "stop": ("suspend JOB", "cancel JOB"),
    "pause": ("suspend JOB",),
    "restart": ("retry JOB",),
    "lint": ("validate JOB.yaml",),
    "estimate": ("plan JOB.yaml",),
    "chat": ("generate --run NAME",),
}
"""Commands for the verbs that people try first; ``typer`` answers misspelled commands itself."""


class Command(TyperCommand):
    """A command of ``qlora``."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, without the names of their Python types, options, and exit codes."""
        arguments, options = [], []
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            if isinstance(parameter, TyperArgument):
                arguments.append((parameter.display_name_raw, record[1]))
            else:
                options.append(record)
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        _write_exit_codes(formatter, exit_codes(self.name))


class CommandGroup(TyperGroup):
    """The commands of ``qlora``."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options, commands, and exit codes."""
        super().format_options(ctx, formatter)
        _write_exit_codes(formatter, exit_codes())

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the program; an error of the system ends it with a sentence on standard error and an exit code."""
        prepare_streams()
        try:
            return super().main(*args, **options)
        except OSError as error:
            from qlora_storage.errors import StorageError, in_words, of_system

            _leave_standard_output()
            with suppress(OSError):
                write_line(f"qlora: {in_words(error)}", error=True)
            sys.exit(STORAGE_FAILED if isinstance(of_system(error), StorageError) else USER_ERROR)

    def invoke(self, ctx: Any) -> Any:
        """Run a command, whose reader may go when it has enough, as ``head`` does."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # what fails here would fail at Python's end, where nothing can be said
        except BrokenPipeError:
            _leave_standard_output()
            raise typer.Exit(int(ctx.invoked_subcommand == "run")) from None  # which is not done then

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse a verb of another tool with the command to use; exit code 2, as for any that is not known."""
        instead = INSTEAD.get(args[0], ())
        if instead and not ctx.resilient_parsing:
            from qlora_cli.kube.target import program

            commands = " or ".join(f"'{program()} {command}'" for command in instead)
            ctx.fail(f"No such command '{args[0]}'. Did you mean {commands}?")
        return super().resolve_command(ctx, args)


def _write_exit_codes(formatter: Any, codes: Mapping[str, str]) -> None:
    with formatter.section("Exit codes"):
        formatter.write_dl([*codes.items()])


def _leave_standard_output() -> None:
    """Let what is not written yet go nowhere, or Python would fail on it once more at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
