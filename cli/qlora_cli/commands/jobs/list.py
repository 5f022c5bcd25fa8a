"""The command ``qlora list``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, connect, program
from qlora_cli.text.choices import OutputFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.text import Text

    from qlora_cli.jobs.job_view import JobView
    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster
    from qlora_cli.text.output import Cell


def list_jobs(
    *,
    everywhere: o.Everywhere = False,
    selector: o.Selector = None,
    sweeps: Annotated[bool, typer.Option("--sweeps", help="List only sweeps.")] = False,
    local: Annotated[bool, typer.Option("--local", help="List local runs.")] = False,
    runs_dir: o.RunsDir = Path("runs"),
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """List jobs and sweeps, or local runs.

    Without a configured cluster, or with --local, lists the runs of this machine. The formats json, yaml and name list
    jobs only or, with --sweeps, sweeps only.
    """
    with exit_with_code():
        from qlora_cli.kube import kubeconfig as config

        target = Target(kubeconfig, context, namespace)
        unconfigured = not (local or kubeconfig or context or config.is_configured())
        if sweeps and (local or unconfigured):
            raise typer.BadParameter(
                "--sweeps lists those of a cluster, and " + ("--local" if local else "none is configured")
            )
        if local or unconfigured:
            _list_runs(runs_dir, output, unconfigured=unconfigured)
        elif sweeps:
            _list_sweeps(target, selector, output, everywhere=everywhere)
        else:
            _list_jobs(target, selector, output, everywhere=everywhere)


def _list_runs(runs_dir: Path, output: OutputFormat, *, unconfigured: bool) -> None:
    from qlora_cli.jobs import job_list
    from qlora_cli.text import output as out

    found = job_list.runs_of(runs_dir)
    if output is not OutputFormat.TEXT:
        out.write_objects([record for record, _ in found], output)
        return
    if not found:
        reason = ", and no cluster is configured" if unconfigured else ""
        out.note(f"No runs in folder {runs_dir}{reason}.")
        out.say_next(f"{program()} init", f"{program()} run JOB.yaml")
        return
    _print_jobs([view for _, view in found], local=True)
    out.say_next(job_list.next_command([view for _, view in found], program(), ""))


def _list_sweeps(target: Target, selector: str | None, output: OutputFormat, *, everywhere: bool) -> None:
    from qlora_cli.cluster_sweeps import sweep_list
    from qlora_cli.text import output as out

    with connect(target) as cluster:
        bodies = sweep_list.sweeps_of(cluster, everywhere=everywhere, selector=selector)
        where = _place(cluster, everywhere=everywhere)
    if output is not OutputFormat.TEXT:
        out.write_objects(bodies, output)
        return
    if not bodies:
        out.note(f"No sweeps in {where}.")
        out.say_next(f"{program()} submit SWEEP.yaml{target.flags()}")
        return
    _print_sweeps(bodies, everywhere=everywhere)
    out.say_next(_show_newest(bodies, target))


def _list_jobs(target: Target, selector: str | None, output: OutputFormat, *, everywhere: bool) -> None:
    """List jobs, and for people sweeps too, where they may be listed."""
    from qlora_cli.cluster_sweeps import sweep_list
    from qlora_cli.jobs import job_list
    from qlora_cli.kube.errors import KubeApiError
    from qlora_cli.text import output as out

    sweeps: list[Object] = []
    with connect(target) as cluster:
        objects = job_list.jobs_of(cluster, everywhere=everywhere, selector=selector)
        here, where = cluster.namespace, _place(cluster, everywhere=everywhere)
        if output is OutputFormat.TEXT:
            with suppress(KubeApiError):  # of an earlier version of the chart, or of a role without them
                sweeps = sweep_list.sweeps_of(cluster, everywhere=everywhere, selector=selector)
    if output is not OutputFormat.TEXT:
        out.write_objects(objects, output)
        return
    if not (objects or sweeps):
        out.note(f"No jobs in {where}.")
        out.say_next(f"{program()} init", f"{program()} submit JOB.yaml{target.flags()}")
        return
    views = job_list.views_of(objects)
    if views:
        _print_jobs(views, everywhere=everywhere)
    if sweeps:
        out.console().print("\n" if views else "", end="")
        _print_sweeps(sweeps, everywhere=everywhere)
    following = [job_list.next_command(views, program(), target.flags(), here)] if views else []
    out.say_next(*following, *([_show_newest(sweeps, target)] if sweeps else []))


def _place(cluster: Cluster, *, everywhere: bool) -> str:
    return "the cluster" if everywhere else f"namespace {cluster.namespace}"


def _print_jobs(views: list[JobView], *, everywhere: bool = False, local: bool = False) -> None:
    from datetime import UTC, datetime

    from qlora_cli.jobs import job_list

    head, rows = job_list.table(views, datetime.now(UTC), everywhere=everywhere, local=local)
    _print_table(head, rows, job_list.NUMBERS, job_list.lines)


def _print_sweeps(bodies: list[Object], *, everywhere: bool) -> None:
    from datetime import UTC, datetime

    from qlora_cli.cluster_sweeps import sweep_list
    from qlora_cli.cluster_sweeps.cluster_sweep import cluster_sweep

    head, rows = sweep_list.table([cluster_sweep(body) for body in bodies], datetime.now(UTC), everywhere=everywhere)
    _print_table(head, rows, sweep_list.NUMBERS, sweep_list.lines)


def _print_table(
    head: list[str], rows: list[list[str | Cell]], right: Sequence[str], lines: Callable[..., list[Text]]
) -> None:
    from qlora_cli.text import output as out

    screen = out.console()
    if not screen.is_terminal:
        out.print_table(screen, head, rows, right=right)
        return
    for line in lines(head, rows, screen.width):
        screen.print(line, soft_wrap=True)


def _show_newest(sweeps: list[Object], target: Target) -> str:
    meta = sweeps[-1]["metadata"]
    where = "" if target.namespace else f" -n {meta['namespace']}"
    return f"{program()} show qlorasweep/{meta['name']}{target.flags()}{where}"
