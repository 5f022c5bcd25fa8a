"""The command ``qlora submit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.jobs.watch import watch_jobs
from qlora_cli.commands.options import exit_with_code
from qlora_cli.commands.result_output import print_done
from qlora_cli.kube.target import Target, connect, program
from qlora_cli.text.choices import DryRun, Form

Manifests = Annotated[list[Path], typer.Argument(metavar="JOB.yaml...", help="Manifests; - reads standard input.")]


def submit(
    manifests: Manifests,
    overrides: o.Set = None,
    *,
    dry_run: Annotated[DryRun, typer.Option(help="server: validate on the API server, create nothing.")] = DryRun.NONE,
    watching: Annotated[bool, typer.Option("--watch", help="Then watch until the job finishes.")] = False,
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Create QLoRAJobs in a cluster.

    Checks the manifests here first; a path on this machine is refused with the command that uploads it.
    """
    with exit_with_code():
        from qlora_cli.jobs import submit as submitting
        from qlora_cli.text import output as out

        target = Target(kubeconfig, context, namespace)
        files = [submitting.read(path, overrides or ()) for path in manifests]
        submissions = [submission for file in files for submission in file.jobs]
        submitting.require_one_namespace(submissions, namespace)
        for kind in (kind for file in files for kind in file.passed_over):
            out.note(f"ignored: {kind}; kubectl apply creates it")
        if dry_run is DryRun.CLIENT:
            created = [submission.body for submission in submissions]
        else:
            with connect(target) as cluster:
                created = [submitting.send(cluster, s, dry_run=dry_run is DryRun.SERVER) for s in submissions]
        print_done(created, output, "created" if dry_run is DryRun.NONE else f"valid (dry run by the {dry_run})")
        names = [job["metadata"]["name"] for job in created]
        if dry_run is not DryRun.NONE:
            files_again = " ".join(str(path) for path in manifests)
            out.say_next(f"{program()} submit {files_again}{target.flags()}")
            return
        if watching:
            watch_jobs(target, tuple(names), None, everywhere=False, until_over=True)
            return
        if output is Form.TEXT:
            where = _where(target, created[0]["metadata"]["namespace"])
            out.say_next(f"{program()} watch {' '.join(names)}{where}", f"{program()} logs {names[0]} --follow{where}")


def _where(target: Target, namespace: str) -> str:
    """Flags for the next command; the manifest may have named the namespace."""
    if target.namespace is None and namespace != "default":
        return f"{target.flags()} -n {namespace}"
    return target.flags()
