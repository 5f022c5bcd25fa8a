"""The command ``qlora retry``."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_with_code
from qlora_cli.commands.result_output import print_done
from qlora_cli.kube.target import Target, connect, program
from qlora_cli.text.choices import DryRun, OutputFormat


def retry(
    job: o.Name,
    overrides: o.Set = None,
    *,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name of the new job; default: JOB-r2.")
    ] = None,
    dry_run: Annotated[
        DryRun, typer.Option(help="Create nothing; validate here (client) or on the API server (server).")
    ] = DryRun.NONE,
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Create a new job with the spec of a failed one.

    The failed job does not change; the new job has its own name and begins at step 0. The operator itself restarts jobs
    from a checkpoint after lost nodes, and after crashes at most policy.maxRestarts times.
    """
    with exit_with_code():
        from qlora_cli.jobs import submit as submitting
        from qlora_cli.text import output as out

        target = Target(kubeconfig, context, namespace)
        with connect(target) as cluster:
            body = submitting.retry_job(cluster, job, name, overrides or ())
            if dry_run is not DryRun.CLIENT:
                submission = submitting.Submission(body, f"retry of {job}")
                body = submitting.send(cluster, submission, dry_run=dry_run is DryRun.SERVER)
        print_done([body], output, "created" if dry_run is DryRun.NONE else f"valid (dry run by the {dry_run})")
        if output is OutputFormat.TEXT and dry_run is DryRun.NONE:
            out.say_next(f"{program()} watch {body['metadata']['name']}{target.flags()}")
