"""The command ``qlora list``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, connect, program
from qlora_cli.text.choices import OutputFormat


def list_jobs(
    *,
    everywhere: o.Everywhere = False,
    selector: o.Selector = None,
    local: Annotated[bool, typer.Option("--local", help="List local runs.")] = False,
    runs_dir: o.RunsDir = Path("runs"),
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """List jobs, or local runs.

    Without a configured cluster, or with --local, lists the runs of this machine.
    """
    with exit_with_code():
        from datetime import UTC, datetime

        from qlora_cli.jobs import job_list
        from qlora_cli.kube import kubeconfig as config
        from qlora_cli.text import output as out

        target = Target(kubeconfig, context, namespace)
        unconfigured = not (local or kubeconfig or context or config.is_configured())
        local = local or unconfigured
        if local:
            found = job_list.runs_of(runs_dir)
            objects, views, where = [record for record, _ in found], [view for _, view in found], f"folder {runs_dir}"
        else:
            with connect(target) as cluster:
                objects = job_list.jobs_of(cluster, everywhere=everywhere, selector=selector)
                where = "the cluster" if everywhere else f"namespace {cluster.namespace}"
            views = job_list.views_of(objects)
        if output is not OutputFormat.TEXT:
            out.write_objects(objects, output)
            return
        if not views:
            reason = ", and no cluster is configured" if unconfigured else ""
            out.note(f"No {'runs' if local else 'jobs'} in {where}{reason}.")
            out.say_next(f"{program()} init", f"{program()} {'run' if local else 'submit'} JOB.yaml{target.flags()}")
            return
        head, rows = job_list.table(views, datetime.now(UTC), everywhere=everywhere, local=local)
        screen = out.console()
        if not screen.is_terminal:
            out.print_table(screen, head, rows, right=job_list.NUMBERS)
        else:
            for line in job_list.lines(head, rows, screen.width):
                screen.print(line, soft_wrap=True)
        out.say_next(job_list.next_command(views, program(), target.flags()))
