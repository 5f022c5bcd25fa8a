"""The command ``qlora generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_on_user_error

AdapterDir = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of an adapter.")]


RunName = Annotated[str | None, typer.Option("--run", metavar="NAME", help="Finished run whose adapter is used.")]


Base = Annotated[
    str | None, typer.Option(metavar="PATH", help="Base model; default: the one the run or adapter names.")
]


Merged = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of a merged model, to compare with the two.")]


Prompt = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Prompt; may be given several times.")]


PromptsFile = Annotated[Path | None, typer.Option(metavar="FILE", help="More prompts, one a line.")]


NewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Maximum length of an answer in tokens.")]


Raw = Annotated[bool, typer.Option("--raw", help="Send prompts unchanged, without the template of training.")]


Sample = Annotated[bool, typer.Option("--sample", help="Sample tokens instead of greedy decoding.")]


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
    """Send the same prompts to the base, the adapter and the merged model.

    Prompts are formatted as in training: as a user's message of the chat template, or as an instruction.
    The answers are shown side by side.
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
