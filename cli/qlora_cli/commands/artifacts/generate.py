"""The command ``qlora generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_on_user_error

AdapterDir = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the adapter.")]


RunName = Annotated[
    str | None, typer.Option("--run", metavar="NAME", help="Name of a finished local run; its adapter is used.")
]


Base = Annotated[
    str | None, typer.Option(metavar="PATH", help="Base model; default: the one that the run or the adapter names.")
]


Merged = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of a merged model to compare, too.")]


Prompt = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Prompt. Can be repeated.")]


PromptsFile = Annotated[Path | None, typer.Option(metavar="FILE", help="File with more prompts, one per line.")]


NewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Maximum number of tokens of an answer.")]


Raw = Annotated[bool, typer.Option("--raw", help="Send prompts unchanged, without the format of training.")]


Sample = Annotated[bool, typer.Option("--sample", help="Sample tokens instead of decoding greedily.")]


def generate(
    *,
    adapter: AdapterDir = None,
    run: RunName = None,
    base: Base = None,
    merged: Merged = None,
    prompt: Prompt = None,
    prompts_file: PromptsFile = None,
    max_new_tokens: NewTokens = 64,
    sample: Sample = False,
    raw: Raw = False,
    runs_dir: o.RunsDir = Path("runs"),
) -> None:
    """Compare the answers of base model, adapter and merged model.

    Sends the same prompts to each model and prints the answers side by side. Prompts are formatted as in training.
    Requires --run or --adapter. Runs the trainer (the extra "trainer" of qlora-operator).
    """
    with exit_on_user_error():
        from qlora_cli.artifacts import generate as asking
        from qlora_cli.local.trainer_process import Commands, require_trainer
        from qlora_cli.text.output import console

        require_trainer("qlora generate")
        models = asking.choose_models(adapter, run, runs_dir, base, merged)
        options = asking.GenerateOptions(asking.prompts(prompt or (), prompts_file), max_new_tokens, sample, raw)
        code = asking.generate(models, options, console(), Commands(), runs_dir / run if run else None)
    raise typer.Exit(code)
