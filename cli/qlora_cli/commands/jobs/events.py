"""The command ``qlora events``."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, connect, program
from qlora_cli.text.choices import OutputFormat


def events(
    job: o.Name,
    *,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Print new events until Ctrl-C.")] = False,
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Show the events of a job, its child Jobs and its pods."""
    with exit_with_code():
        from datetime import UTC, datetime

        from qlora_cli.jobs import events as job_events
        from qlora_cli.kube.target import get_job
        from qlora_cli.text import output as out

        target = Target(kubeconfig, context, namespace)
        with connect(target) as cluster:
            get_job(cluster, job)
            family, screen = job_events.JobObjects(job), out.console()
            if follow:
                for event in job_events.follow(cluster, family):
                    screen.print(job_events.line(event), soft_wrap=True)
                return
            bodies = job_events.events_of(cluster, family)
        if output is not OutputFormat.TEXT:
            out.write_objects(bodies, output, kind=out.EVENT)
            return
        rows = job_events.rows([job_events.see(body) for body in bodies], datetime.now(UTC))
        if not rows:
            out.note(f'No events of job "{job}"; the API server keeps them for an hour.')
        else:
            out.print_table(screen, job_events.HEAD, rows)
        out.say_next(f"{program()} show {job}{target.flags()}")
