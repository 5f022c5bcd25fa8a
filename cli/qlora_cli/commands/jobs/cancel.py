"""The command ``qlora cancel``."""

from __future__ import annotations

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.exit_codes import CHECK_FAILED
from qlora_cli.commands.options import exit_with_code
from qlora_cli.commands.result_output import print_done
from qlora_cli.kube.target import Target, connect, program
from qlora_cli.text.choices import OutputFormat


def cancel(
    jobs: o.NamesOfSweepsToo,
    *,
    yes: o.Yes = False,
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Delete jobs and their pods, or sweeps and their trials.

    Published adapters are kept. To continue a job or sweep later, suspend it instead. A name is that of a job if there
    is one, else of a sweep; qlorasweep/NAME is always a sweep.
    """
    with exit_with_code():
        from qlora_cli.jobs import actions
        from qlora_cli.text import output as out

        target = Target(kubeconfig, context, namespace)
        with connect(target) as cluster:
            found = actions.jobs_to_delete(cluster, jobs)
            if not yes:
                for job in found:
                    out.note(actions.describe(job))
            if not actions.confirm(f"Delete {'it' if len(found) == 1 else f'these {len(found)}'}?", yes=yes):
                raise typer.Exit(CHECK_FAILED)
            for job in found:
                actions.delete(cluster, job)
        print_done(found, output, "deleted")
        if output is OutputFormat.TEXT:
            out.say_next(f"{program()} list{target.flags()}")
