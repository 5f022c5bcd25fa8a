"""The command ``qlora submit``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.exit_codes import CHECK_FAILED
from qlora_cli.commands.jobs.watch import watch_jobs
from qlora_cli.commands.options import exit_with_code
from qlora_cli.commands.result_output import print_done
from qlora_cli.kube.target import Target, connect, program
from qlora_cli.text.choices import DryRun, OutputFormat

if TYPE_CHECKING:
    from qlora_cli.jobs.submit import Submission
    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster

Manifests = Annotated[
    list[Path], typer.Argument(metavar="JOB.yaml", help="Manifests of jobs and sweeps; - for standard input.")
]


def submit(
    manifests: Manifests,
    overrides: o.Set = None,
    *,
    dry_run: Annotated[
        DryRun, typer.Option(help="Create nothing; validate here (client) or on the API server (server).")
    ] = DryRun.NONE,
    watching: Annotated[
        bool | None,
        typer.Option(
            "--watch/--no-watch",
            help="Watch the jobs, or the sweep, until they finish; default: on a terminal.",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="GPU to plan for, such as h100-80gb; default: the smallest GPU of the nodes where the job may run.",
        ),
    ] = None,
    yes: o.Yes = False,
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Create QLoRAJobs and QLoRASweeps in a cluster.

    Validates the manifests first. On a terminal, shows the memory plan, for a sweep also its trials and budget, asks
    for confirmation, and then watches the jobs or the sweep. If a manifest names a path on this machine, the error
    shows the command that uploads it.
    """
    with exit_with_code():
        from qlora_cli.jobs import submit as submitting
        from qlora_cli.text import output as out

        if gpu:
            from qlora_memory.gpus import gpu_named

            gpu_named(gpu)
        target = Target(kubeconfig, context, namespace)
        files = [submitting.read_manifest(path, overrides or ()) for path in manifests]
        submissions = [submission for file in files for submission in (*file.jobs, *file.sweeps)]
        has_sweeps = any(file.sweeps for file in files)
        if watching and has_sweeps and len(submissions) > 1:
            raise typer.BadParameter("--watch follows jobs, or one sweep: submit sweeps one by one")
        submitting.require_one_namespace(submissions, namespace)
        for kind in (kind for file in files for kind in file.ignored):
            out.note(f"ignored: {kind}; kubectl apply creates it")
        on_terminal = dry_run is DryRun.NONE and sys.stdin.isatty() and sys.stdout.isatty()
        if dry_run is DryRun.CLIENT:
            created = [submission.body for submission in submissions]
        else:
            with connect(target) as cluster:
                if on_terminal and not yes and not _confirmed(cluster, submissions, gpu):
                    raise typer.Exit(CHECK_FAILED)
                created = [submitting.send(cluster, s, dry_run=dry_run is DryRun.SERVER) for s in submissions]
        print_done(created, output, "created" if dry_run is DryRun.NONE else f"valid (dry run by the {dry_run})")
        if dry_run is not DryRun.NONE:
            files_again = " ".join(str(path) for path in manifests)
            out.say_next(f"{program()} submit {files_again}{target.flags()}")
            return
        if watching is None:
            watching = on_terminal and output is OutputFormat.TEXT and not (has_sweeps and len(created) > 1)
        _watch_or_say(created, target, output, watching=watching)


def _watch_or_say(created: Sequence[Object], target: Target, output: OutputFormat, *, watching: bool) -> None:
    """Watch what was created, or say how to."""
    from qlora_cli.kube.target import is_sweep
    from qlora_cli.text import output as out

    names = [_reference(body) for body in created]
    if watching:
        namespaces = {body["metadata"]["namespace"] for body in created}
        target = replace(target, namespace=namespaces.pop()) if len(namespaces) == 1 else target
        watch_jobs(target, tuple(names), None, everywhere=False, until_over=True)
        return
    if output is not OutputFormat.TEXT:
        return
    where = _where(target, created[0]["metadata"]["namespace"])
    has_sweeps = any(map(is_sweep, created))
    watch = names if has_sweeps else [" ".join(names)]
    logs = [] if has_sweeps else [f"{program()} logs {names[0]} --follow{where}"]
    out.say_next(*(f"{program()} watch {each}{where}" for each in watch), *logs)


def _confirmed(cluster: Cluster, submissions: Sequence[Submission], gpu: str | None) -> bool:
    """Show what will be created and ask for it, on standard error."""
    from qlora_cli.cluster_sweeps.plan_sweep import sweep_summary
    from qlora_cli.jobs.actions import confirm
    from qlora_cli.kube.target import is_sweep
    from qlora_cli.memory_plan.cluster_plan import job_summary, node_labels
    from qlora_cli.text import output as out
    from qlora_cli.text.paragraphs import LabelledLines

    screen = out.console(stderr=True)
    labels = [] if gpu else node_labels(cluster)
    for submission in submissions:
        summary = sweep_summary if is_sweep(submission.body) else job_summary
        with screen.status("planning …"):
            rows = summary(submission.body, gpu, labels)
        screen.print(LabelledLines(rows), crop=False)
        screen.print()
    where = submissions[0].body["metadata"].get("namespace") or cluster.namespace
    what = "it" if len(submissions) == 1 else f"all {len(submissions)}"
    context = f", context {cluster.context}" if cluster.context else ""
    return confirm(f"Create {what} in namespace {where}{context}?", yes=False)


def _reference(body: Object) -> str:
    """Return how 'qlora watch' names what was created."""
    from qlora_cli.kube.target import SWEEP_REFERENCES, is_sweep

    name = str(body["metadata"]["name"])
    return f"{SWEEP_REFERENCES[0]}{name}" if is_sweep(body) else name


def _where(target: Target, namespace: str) -> str:
    """Flags for the next command; the manifest may have named the namespace."""
    if target.namespace is None and namespace != "default":
        return f"{target.flags()} -n {namespace}"
    return target.flags()
