"""The command ``qlora watch``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.exit_codes import CHECK_FAILED
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, connect, program

if TYPE_CHECKING:
    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster


def watch(
    jobs: o.SomeNames = None,
    *,
    everywhere: o.Everywhere = False,
    selector: o.Selector = None,
    forever: Annotated[
        bool, typer.Option("--forever", help="Keep watching after the named jobs have finished.")
    ] = False,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Watch jobs or a sweep live.

    With names, watches these jobs, or this sweep and its trials, until they finish. Without names, watches all jobs of
    the namespace until Ctrl-C.
    """
    with exit_with_code():
        names = tuple(dict.fromkeys(jobs or ()))
        target = Target(kubeconfig, context, namespace)
        watch_jobs(target, names, selector, everywhere=everywhere, until_over=bool(names) and not forever)


def watch_jobs(
    target: Target, names: tuple[str, ...], selector: str | None, *, everywhere: bool, until_over: bool
) -> None:
    from qlora_cli.jobs import lookup
    from qlora_cli.jobs import watch as watching
    from qlora_cli.kube.target import get_job, get_job_or_sweep, is_sweep
    from qlora_cli.text import output as out

    with connect(target) as cluster:
        find = get_job_or_sweep if len(names) == 1 else get_job
        for body in [find(cluster, name) for name in names]:
            if is_sweep(body):
                _watch_sweep(cluster, body, target, until_over=until_over)
        events = watching.start(cluster, watching.WatchRequest(names, selector, everywhere))
        board = watching.WatchedJobs(frozenset(names))
        place = "all namespaces" if everywhere else f"namespace {cluster.namespace}"
        title = f"{place}{f' · {cluster.context}' if cluster.context else ''}"
        watching.watch(out.console(), events, board, title, until_over=until_over)
    jobs = list(board.jobs.values())
    if len(names) == 1 and jobs:
        out.say_next(*lookup.next_commands(jobs[0], target))
    raise typer.Exit(CHECK_FAILED if board.any_failed else 0)


def _watch_sweep(cluster: Cluster, body: Object, target: Target, *, until_over: bool) -> NoReturn:
    """Watch a sweep and its trials."""
    from qlora_cli.cluster_sweeps import show_sweep, watch_sweep
    from qlora_cli.cluster_sweeps.cluster_sweep import cluster_sweep
    from qlora_cli.jobs import watch as watching
    from qlora_cli.text import output as out

    sweep = cluster_sweep(body)
    events = watch_sweep.start(cluster, sweep)
    board = watch_sweep.WatchedSweep(sweep=sweep, news=[watch_sweep.line(sweep)])
    title = f"namespace {sweep.namespace}{f' · {cluster.context}' if cluster.context else ''}"
    watching.watch(out.console(), events, board, title, until_over=until_over)
    out.say_next(*show_sweep.next_commands(board.sweep, program(), target))
    raise typer.Exit(CHECK_FAILED if board.any_failed else 0)
