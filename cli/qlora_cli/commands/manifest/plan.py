"""The command ``qlora plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.exit_codes import USER_ERROR
from qlora_cli.commands.options import exit_on_user_error
from qlora_cli.text.choices import PlainOutputFormat
from qlora_cli.text.printable import as_json, write_line

GpuName = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="GPU to plan for, such as h100-80gb; default: that of this machine."),
]


GpuCount = Annotated[
    int | None, typer.Option("--gpus", min=1, metavar="N", help="Number of GPUs; default: that of the job.")
]


Price = Annotated[
    float | None, typer.Option("--price", min=0, metavar="X", help="Price of one GPU-hour, to estimate the cost.")
]


Tokens = Annotated[
    int | None, typer.Option("--tokens", min=1, metavar="N", help="Number of tokens per epoch, to estimate the time.")
]


WhatIf = Annotated[bool, typer.Option("--what-if", help="Also plan other GPUs, LoRA ranks and sequence lengths.")]


ModelConfig = Annotated[
    Path | None,
    typer.Option("--model-config", metavar="config.json", help="Read the model's configuration from this file."),
]


Profiles = Annotated[
    Path | None,
    typer.Option(
        "--profiles",
        metavar="values.yaml",
        help="Values of the operator's chart, or its ConfigMap, to plan for the GPU of the job's profile.",
    ),
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
    output: o.PlainOutput = PlainOutputFormat.TEXT,
) -> None:
    """Predict the memory and time of a job.

    Reads a few kilobytes: the base model's configuration and the headers of its weights. Needs no GPU.
    """
    with exit_on_user_error():
        from qlora_cli.memory_plan import plan_job as planning

        asked = planning.PlanOptions(gpu, gpus, price, tokens, what_if, model_config, profiles)
        answered = planning.answer(job, asked, tuple(overrides or ()))
        if output is PlainOutputFormat.JSON:
            write_line(as_json(planning.as_dict(answered)))
        else:
            from qlora_cli.memory_plan import plan_view
            from qlora_cli.text.output import console

            console().print(plan_view.show(answered), crop=False)
    raise typer.Exit(0 if answered.fits else USER_ERROR)
