"""The command ``qlora logs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, connect, is_local

Attempt = Annotated[int | None, typer.Option("--attempt", min=1, metavar="N", help="Attempt; default: the newest.")]


def logs(
    job: o.Reference,
    *,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Follow until the job ends, across attempts.")] = False,
    attempt: Attempt = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Logs of the Prepare pod.")] = False,
    worker: Annotated[int | None, typer.Option(min=0, metavar="I", help="Logs of one pod only.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, metavar="R", help="Logs of one rank only.")] = None,
    tail: Annotated[int | None, typer.Option(min=0, metavar="N", help="Last N lines of each pod.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Only lines newer than 30s, 5m, 2h.")] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Prefix each line with its time.")] = False,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Print the logs of all ranks of a job as one.

    Lines are merged by time; each begins with the rank that wrote it, or with its worker where none is named.
    """
    with exit_with_code():
        from qlora_cli.jobs import logs as tailing
        from qlora_cli.jobs.log_printer import Printer, parse_since, print_local
        from qlora_cli.text.output import note

        if is_local(job):
            print_local(Path(job), attempt, prepare=prepare, tail=tail, follow=follow)
            return
        wanted = tailing.Wanted(
            attempt=tailing.PREPARE if prepare else attempt,
            worker=worker,
            rank=rank,
            follow=follow,
            tail=tail,
            since_seconds=parse_since(since),
            timestamps=timestamps,
        )
        with connect(Target(kubeconfig, context, namespace)) as cluster:
            lines = tailing.Follower(cluster, job, wanted).lines(note) if follow else tailing.read(cluster, job, wanted)
            printer = Printer(timestamps=timestamps)
            for line in lines:
                printer.line(line)
