"""The command ``qlora compare``."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, program
from qlora_cli.text.choices import OutputFormat
from qlora_cli.text.printable import write


def compare(
    jobs: o.References,
    *,
    every: Annotated[bool, typer.Option("--all", help="Compare policy and scheduling, too.")] = False,
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Compare settings and results of jobs and local runs.

    Prints only the settings that differ. Requires at least two jobs or runs.
    """
    with exit_with_code():
        from qlora_cli.jobs import compare as comparing
        from qlora_cli.jobs import lookup
        from qlora_cli.kube.errors import ClusterError
        from qlora_cli.text import output as out

        if len(jobs) < 2:
            raise ClusterError("JOB: give at least two, names of jobs or folders of local runs (runs/NAME)")
        found = lookup.find(Target(kubeconfig, context, namespace), jobs)
        if output is OutputFormat.NAME:
            write("".join(f"{out.name_of(each.body)}\n" for each in found))
            return
        columns = [comparing.ComparedJob(each.view, each.body.get("spec") or {}) for each in found]
        if output is not OutputFormat.TEXT:
            out.write_plain(comparing.as_plain(columns, every=every), output)
            return
        screen = out.console()
        for line in comparing.pages(columns, screen.width if screen.is_terminal else None, every=every):
            screen.print(line, soft_wrap=True)
        if best := comparing.best(columns):
            out.say_next(f"{program()} verify {best}{Target(kubeconfig, context, namespace).flags()}")
