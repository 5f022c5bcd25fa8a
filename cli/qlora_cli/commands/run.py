"""The command ``qlora run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_on_user_error

Ranks = Annotated[int | None, typer.Option(metavar="N", help="Number of ranks; default: one per GPU, or two on a CPU.")]


Fresh = Annotated[bool, typer.Option("--fresh", help="Start over; the existing run of this name is moved aside.")]


def run(
    job: o.Manifest,
    ranks: Ranks = None,
    runs_dir: o.RunsDir = Path("runs"),
    fresh: Fresh = False,
    overrides: o.Set = None,
) -> None:
    """Run a QLoRAJob on this machine, or resume it.

    Ctrl-C saves a checkpoint; the same command resumes the run. Uses all GPUs, or those in CUDA_VISIBLE_DEVICES.
    An empty CUDA_VISIBLE_DEVICES selects the CPU. Relative paths are resolved against the current folder.
    """
    with exit_on_user_error():
        from qlora_cli.local.run import RunRequest
        from qlora_cli.local.run import run as run_job
        from qlora_cli.local.trainer_process import Commands, require_trainer
        from qlora_cli.text.output import console

        require_trainer("qlora run")
        request = RunRequest(job, runs_dir, ranks, fresh, tuple(overrides or ()))
        code = run_job(request, console(), Commands())
    raise typer.Exit(code)
