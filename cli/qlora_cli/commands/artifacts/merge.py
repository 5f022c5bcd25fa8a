"""The command ``qlora merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.artifacts.download import find_published
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, program
from qlora_cli.text.printable import write_line


def merge(
    what: o.Published,
    *,
    to: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the merged model; new or empty.", parser=o.to_path)
    ],
    base: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Base model; default: the one that the manifest names.")
    ] = None,
    secret: o.Secret = False,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Merge a published adapter into its base model.

    Writes one model in 16 bits, which can be used without PEFT. Verifies the adapter first. Runs the trainer (the extra
    "trainer" of qlora-operator) in host memory.
    """
    with exit_with_code():
        from qlora_cli.artifacts import merge as merging
        from qlora_cli.local.trainer_process import Commands, require_trainer
        from qlora_cli.text import output as out

        require_trainer("qlora merge")
        published = find_published(what, Target(kubeconfig, context, namespace), secret=secret)
        plan = merging.plan(published, base)
        with merging.output_folder(to) as folder:
            with out.console(stderr=True).status("fetching the adapter …") as status:
                adapter = merging.fetch(published, status.update)
            if code := merging.run(plan, adapter, folder, Commands()):
                raise typer.Exit(code)
        write_line(f"{to}: {plan.base} with the adapter merged in")
        out.say_next(f"{program()} generate --adapter {adapter} --merged {to} --prompt …")
