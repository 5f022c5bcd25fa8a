"""Answer the verbs of kubectl and of other tools with the command of ``qlora`` that does it."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

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


class CommandGroup(TyperGroup):
    """The commands of ``qlora``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse a verb of another tool with the command to use; exit code 2, as for any that is not known."""
        instead = INSTEAD.get(args[0], ())
        if instead and not ctx.resilient_parsing:
            from qlora_cli.kube.target import program

            commands = " or ".join(f"'{program()} {command}'" for command in instead)
            ctx.fail(f"No such command '{args[0]}'. Did you mean {commands}?")
        return super().resolve_command(ctx, args)
