"""The command ``qlora show``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, connect, is_local, program
from qlora_cli.text.choices import OutputFormat

if TYPE_CHECKING:
    from qlora_cli.jobs.lookup import LookupResult
    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster


def show(
    job: o.ReferenceOfSweepToo,
    *,
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Show the details of a job, a sweep or a local run.

    Prints settings, progress, attempts and how they ended, memory by component, and the adapter. For a sweep, prints
    its parameters, state and trials. A name is that of a job if there is one, else of a sweep; qlorasweep/NAME is
    always a sweep.
    """
    with exit_with_code():
        from pathlib import Path

        from qlora_cli.jobs import lookup
        from qlora_cli.kube.target import folder_hint, get_job_or_sweep, is_sweep

        target = Target(kubeconfig, context, namespace)
        if is_local(job):
            _show_job(lookup.local_run(Path(job)), target, output)
            return
        with folder_hint([job]), connect(target) as cluster:
            body = get_job_or_sweep(cluster, job)
            if is_sweep(body):
                _show_sweep(cluster, body, target, output)
                return
        _show_job(lookup.found_job(body), target, output)


def _show_job(found: LookupResult, target: Target, output: OutputFormat) -> None:
    from datetime import UTC, datetime

    from qlora_cli.jobs import lookup
    from qlora_cli.jobs import show as job_view
    from qlora_cli.text import output as out

    if output is not OutputFormat.TEXT:
        out.write_objects([found.body], output, one=True)
        return
    screen = out.console()
    for line in job_view.page(found.view, found.body, datetime.now(UTC), screen.width):
        screen.print(line, soft_wrap=True)
    out.say_next(*lookup.next_commands(found.view, target))


def _show_sweep(cluster: Cluster, body: Object, target: Target, output: OutputFormat) -> None:
    from datetime import UTC, datetime

    from qlora_cli.text import output as out

    if output is not OutputFormat.TEXT:
        out.write_objects([body], output, one=True)
        return
    from qlora_cli.cluster_sweeps import show_sweep
    from qlora_cli.cluster_sweeps.cluster_sweep import cluster_sweep
    from qlora_cli.cluster_sweeps.sweep_reader import read_trials

    sweep, screen = cluster_sweep(body), out.console()
    for part in show_sweep.page(sweep, read_trials(cluster, body), datetime.now(UTC)):
        screen.print(part, crop=False)
    out.say_next(*show_sweep.next_commands(sweep, program(), target))
