"""The command ``qlora show``."""

from __future__ import annotations

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target
from qlora_cli.text.choices import OutputFormat


def show(
    job: o.Reference,
    *,
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Show the details of a job or a local run.

    Prints settings, progress, attempts and how they ended, memory by component, and the adapter.
    """
    with exit_with_code():
        from datetime import UTC, datetime

        from qlora_cli.jobs import lookup
        from qlora_cli.jobs import show as showing
        from qlora_cli.text import output as out

        target = Target(kubeconfig, context, namespace)
        found = lookup.find(target, [job])[0]
        if output is not OutputFormat.TEXT:
            out.write_objects([found.body], output, one=True)
            return
        screen = out.console()
        for line in showing.page(found.view, found.body, datetime.now(UTC), screen.width):
            screen.print(line, soft_wrap=True)
        out.say_next(*lookup.next_commands(found.view, target))
