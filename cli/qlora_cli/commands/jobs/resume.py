"""The command ``qlora resume``."""

from __future__ import annotations

from qlora_cli.commands import options as o
from qlora_cli.commands.jobs.suspend import set_suspend
from qlora_cli.kube.target import Target
from qlora_cli.text.choices import OutputFormat


def resume(
    jobs: o.NamesOfSweepsToo,
    *,
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Resume suspended jobs or sweeps from their checkpoints.

    A name is that of a job if there is one, else of a sweep; qlorasweep/NAME is always a sweep.
    """
    set_suspend(Target(kubeconfig, context, namespace), jobs, output, suspend=False)
