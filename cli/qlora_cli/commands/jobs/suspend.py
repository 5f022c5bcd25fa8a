"""The command ``qlora suspend``."""

from __future__ import annotations

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_with_code
from qlora_cli.commands.result_output import print_done
from qlora_cli.kube.target import Target, connect, program
from qlora_cli.text.choices import OutputFormat


def suspend(
    jobs: o.NamesOfSweepsToo,
    *,
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Suspend jobs or sweeps: save a checkpoint and release the GPUs.

    A name is that of a job if there is one, else of a sweep; qlorasweep/NAME is always a sweep.
    """
    set_suspend(Target(kubeconfig, context, namespace), jobs, output, suspend=True)


def set_suspend(target: Target, names: list[str], output: OutputFormat, *, suspend: bool) -> None:
    with exit_with_code():
        from qlora_cli.jobs import actions
        from qlora_cli.text import output as out

        with connect(target) as cluster:
            pairs = [actions.set_suspend(cluster, name, suspend=suspend) for name in dict.fromkeys(names)]
        word = "suspended" if suspend else "resumed"
        for job, changed in pairs:
            print_done([job], output, f"{word}" if changed else f"unchanged, it is {word} already")
        if output is OutputFormat.TEXT:
            command = f"{program()} watch {' '.join(names)}{target.flags()}"
            out.say_next(command, *([f"{program()} resume {' '.join(names)}{target.flags()}"] if suspend else []))
