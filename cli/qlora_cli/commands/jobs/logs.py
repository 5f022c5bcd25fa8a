"""The command ``qlora logs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, connect, folder_hint, is_local

Attempt = Annotated[
    int | None, typer.Option("--attempt", min=1, metavar="N", help="Number of the attempt; default: the newest.")
]


def logs(
    job: o.Reference,
    *,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Print new lines until the job ends, across attempts.")
    ] = False,
    attempt: Attempt = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Print the logs of the Prepare pod.")] = False,
    worker: Annotated[int | None, typer.Option(min=0, metavar="N", help="Print only the logs of worker N.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, metavar="N", help="Print only the logs of rank N.")] = None,
    tail: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Print only the last N lines of each pod.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Print only lines newer than this, such as 30s, 5m or 2h.")
    ] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Print the time of each line.")] = False,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Print the logs of all ranks of a job, merged by time.

    Each line begins with the rank that wrote it, or with the worker if the rank is not known.
    """
    with exit_with_code():
        from qlora_cli.jobs import logs as job_logs
        from qlora_cli.jobs.log_printer import Printer, parse_since, print_local
        from qlora_cli.text.output import note

        if is_local(job):
            print_local(Path(job), attempt, prepare=prepare, tail=tail, follow=follow)
            return
        wanted = job_logs.Wanted(
            attempt=job_logs.PREPARE if prepare else attempt,
            worker=worker,
            rank=rank,
            follow=follow,
            tail=tail,
            since_seconds=parse_since(since),
            timestamps=timestamps,
        )
        with folder_hint([job]), connect(Target(kubeconfig, context, namespace)) as cluster:
            lines = (
                job_logs.Follower(cluster, job, wanted).lines(note) if follow else job_logs.read(cluster, job, wanted)
            )
            printer = Printer(timestamps=timestamps)
            for line in lines:
                printer.line(line)
