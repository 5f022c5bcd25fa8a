"""The command ``qlora plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_on_user_error
from qlora_cli.text.choices import PlainForm
from qlora_cli.text.printable import as_json, write_line

GpuName = Annotated[
    str | None, typer.Option("--gpu", metavar="NAME", help="GPU, such as h100-80gb; default: this machine's.")
]


GpuCount = Annotated[int | None, typer.Option("--gpus", min=1, metavar="N", help="Number of GPUs; default: the job's.")]


Price = Annotated[float | None, typer.Option("--price", min=0, metavar="X", help="Price of one GPU-hour.")]


Tokens = Annotated[
    int | None, typer.Option("--tokens", min=1, metavar="N", help="Tokens of one epoch, to estimate the time.")
]


WhatIf = Annotated[bool, typer.Option("--what-if", help="Also plan other GPUs, LoRA ranks and sequence lengths.")]


ModelConfig = Annotated[
    Path | None,
    typer.Option("--model-config", metavar="config.json", help="Use this config.json instead of reading the model."),
]


Profiles = Annotated[
    Path | None,
    typer.Option("--profiles", metavar="values.yaml", help="The chart's values, whose profile names the GPU."),
]


def plan(
    job: o.Manifest,
    *,
    gpu: GpuName = None,
    gpus: GpuCount = None,
    price: Price = None,
    tokens: Tokens = None,
    what_if: WhatIf = False,
    model_config: ModelConfig = None,
    profiles: Profiles = None,
    overrides: o.Set = None,
    output: o.PlainOutput = PlainForm.TEXT,
) -> None:
    """Predict a job's memory and time.

    Reads the base's configuration and the headers of its weights, kilobytes of gigabytes; no GPU is needed. The exit
    code is 40 if it does not fit.
    """
    with exit_on_user_error():
        from qlora_cli.memory_plan import plan_job as planning

        asked = planning.PlanOptions(gpu, gpus, price, tokens, what_if, model_config, profiles)
        answered = planning.answer(job, asked, tuple(overrides or ()))
        if output is PlainForm.JSON:
            write_line(as_json(planning.as_dict(answered)))
        else:
            from qlora_cli.memory_plan import plan_view
            from qlora_cli.text.output import console

            console().print(plan_view.show(answered), crop=False)
    raise typer.Exit(0 if answered.fits else o.USER_ERROR)
