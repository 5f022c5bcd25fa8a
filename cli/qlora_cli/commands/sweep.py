"""The command ``qlora sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_on_user_error
from qlora_cli.commands.run import Ranks

SweepManifest = Annotated[
    Path, typer.Argument(metavar="SWEEP.yaml", help="Manifest of one QLoRASweep; - for standard input.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over; the existing sweep of this name is moved aside.")]


def sweep(
    manifest: SweepManifest, ranks: Ranks = None, runs_dir: o.RunsDir = Path("runs"), fresh: Fresh = False
) -> None:
    """Search for the best settings of a job, on this machine.

    Trials run one after the other, each on the whole machine as 'qlora run' would. Ctrl-C saves a checkpoint; the same
    command resumes the sweep.
    """
    with exit_on_user_error():
        from qlora_cli.local.trainer_process import Commands, require_trainer
        from qlora_cli.text.output import console

        require_trainer("qlora sweep")
        from qlora_cli.sweeps.run_sweep import SweepRequest, run_sweep

        code = run_sweep(SweepRequest(manifest, runs_dir, ranks, fresh), console(), Commands())
    raise typer.Exit(code)
