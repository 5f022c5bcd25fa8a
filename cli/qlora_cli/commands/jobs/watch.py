"""The command ``qlora watch``."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.exit_codes import CHECK_FAILED
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, connect


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
    """Watch jobs live.

    With names, watches these jobs until they finish. Without names, watches all jobs of the namespace until Ctrl-C.
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
    from qlora_cli.kube.target import get_job
    from qlora_cli.text import output as out

    with connect(target) as cluster:
        for name in names:
            get_job(cluster, name)
        events = watching.start(cluster, watching.WatchRequest(names, selector, everywhere))
        board = watching.WatchedJobs(frozenset(names))
        place = "all namespaces" if everywhere else f"namespace {cluster.namespace}"
        title = f"{place}{f' · {cluster.context}' if cluster.context else ''}"
        watching.watch(out.console(), events, board, title, until_over=until_over)
    jobs = list(board.jobs.values())
    if len(names) == 1 and jobs:
        out.say_next(*lookup.next_commands(jobs[0], target))
    raise typer.Exit(CHECK_FAILED if board.any_failed else 0)
