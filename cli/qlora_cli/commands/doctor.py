"""The command ``qlora doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.exit_codes import CHECK_FAILED
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, connect, program
from qlora_cli.text.choices import OutputFormat
from qlora_cli.text.printable import write


def doctor(
    manifests: Annotated[
        list[Path] | None, typer.Argument(metavar="JOB.yaml", help="Also check these manifests before you submit them.")
    ] = None,
    *,
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Find out what keeps jobs from running, and suggest fixes.

    Checks the cluster, your permissions, the CustomResourceDefinition, the operator, the admission policy, GPUs,
    profiles, gang scheduling, the objects that jobs name, object storage, images, network policies, monitors and
    quotas.
    """
    with exit_with_code():
        from importlib.metadata import version

        from qlora_cli.doctor import findings as said
        from qlora_cli.doctor.checks import run_checks
        from qlora_cli.doctor.cluster_snapshot import read_cluster
        from qlora_cli.text import output as out

        bodies = []
        if manifests:
            from qlora_cli.jobs import submit

            bodies = [submission.body for path in manifests for submission in submit.read_manifest(path).jobs]
        target = Target(kubeconfig, context, namespace)
        with connect(target) as cluster:
            findings = run_checks(read_cluster(cluster, bodies), version("qlora-operator"))
        bad = any(finding.level is said.Level.FAULT for finding in findings)
        if output in (OutputFormat.JSON, OutputFormat.YAML):
            out.write_plain([finding.to_json_dict() for finding in findings], output)
        elif output is OutputFormat.NAME:
            write("".join(f"{f.check}\n" for f in findings if f.level is said.Level.FAULT))
        else:
            screen = out.console()
            for line in said.lines(findings):
                screen.print(line, soft_wrap=True)
            out.note(said.summary(findings))
            if not bad:
                files = " ".join(map(str, manifests or ())) or "JOB.yaml"
                out.say_next(f"{program()} submit {files}{target.flags()}")
    raise typer.Exit(CHECK_FAILED if bad else 0)
