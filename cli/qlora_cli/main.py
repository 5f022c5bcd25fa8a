"""The command ``qlora``. Thin: each command imports what it needs, so that ``qlora --help`` loads nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cluster import registration
from qlora_cli.cluster.options import EXIT_CODES

USER_ERROR = 40
"""As ``qlora_api.contract.ExitCode.USER_ERROR``, without the import; a test holds them together."""

app = typer.Typer(
    name="qlora",
    help="Fine-tune with QLoRA: on this machine, or as QLoRAJobs in a Kubernetes cluster.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would double the time it takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Output(StrEnum):
    TEXT = "text"
    JSON = "json"


Job = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="Manifest with one QLoRAJob; - reads standard input.")]
Jobs = Annotated[list[Path], typer.Argument(metavar="JOB.yaml...", help="Manifests; - reads standard input.")]
Ranks = Annotated[int | None, typer.Option(help="Ranks; default: one for each GPU, or two CPU processes.")]
RunsDir = Annotated[Path, typer.Option(help="Folder of all local runs.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Put an earlier run of this name aside and start a new one.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Set a field, such as training.maxSteps=10; null takes it away."),
]
As = Annotated[Output, typer.Option("-o", "--output", help="text or json.")]
FieldPath = Annotated[
    str, typer.Argument(metavar="[FIELD]", help="Such as lora.rank or spec.dataset; default: the spec.")
]
AdapterDir = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of an adapter.")]
RunName = Annotated[str | None, typer.Option("--run", metavar="NAME", help="Finished run whose adapter is asked.")]
Base = Annotated[
    str | None, typer.Option(metavar="PATH", help="Base model; default: the one the run or adapter names.")
]
Merged = Annotated[str | None, typer.Option(metavar="DIR", help="Merged model, to answer beside the two.")]
Prompt = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Prompt; may be given several times.")]
PromptsFile = Annotated[Path | None, typer.Option(metavar="FILE", help="More prompts, one a line.")]
NewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer in tokens.")]
GpuName = Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="Such as h100-80gb; default: the one here.")]
GpuCount = Annotated[int | None, typer.Option("--gpus", min=1, metavar="N", help="GPUs; default: as the job says.")]
Price = Annotated[float | None, typer.Option("--price", min=0, metavar="X", help="Of one GPU for one hour.")]
Tokens = Annotated[int | None, typer.Option("--tokens", min=1, metavar="N", help="Tokens of one epoch, for the time.")]
WhatIf = Annotated[bool, typer.Option("--what-if", help="Other GPUs, ranks and sequence lengths as well.")]
ModelConfig = Annotated[
    Path | None, typer.Option("--model-config", metavar="config.json", help="The base's configuration, in its place.")
]
ReportOf = Annotated[
    str, typer.Argument(metavar="RUN", help="Name or folder of a run, or folder of a published adapter.")
]
ReportFile = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="FILE", help="Default: report.html in the folder of the run.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Put prompts as they are, not as in training.")]
Sample = Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")]


@contextmanager
def _mistakes_end_it() -> Iterator[None]:
    """A user's mistake: in words on standard error, and the contract's exit code."""
    # All errors in words derive from ValueError; a pydantic error from our own objects is a bug and must be seen.
    from pydantic import ValidationError

    try:
        yield
    except ValidationError:
        raise
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(USER_ERROR) from None


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"qlora {version('qlora-operator')}")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune with QLoRA: on this machine, or as QLoRAJobs in a Kubernetes cluster."""


@app.command()
def run(
    job: Job, ranks: Ranks = None, runs_dir: RunsDir = Path("runs"), fresh: Fresh = False, overrides: Set = None
) -> None:
    """Run a QLoRAJob on this machine, or resume it.

    Ctrl-C checkpoints and ends with exit code 130; the same command goes on from there. All GPUs are used, or those
    of CUDA_VISIBLE_DEVICES (empty: the CPU). Relative paths count from the current folder.
    """
    with _mistakes_end_it():
        from qlora_cli import render
        from qlora_cli.attempt import Commands
        from qlora_cli.run import Request
        from qlora_cli.run import run as run_job

        request = Request(job, runs_dir, ranks, fresh, tuple(overrides or ()))
        code = run_job(request, render.console(), Commands())
    raise typer.Exit(code)


@app.command()
def validate(jobs: Jobs, output: As = Output.TEXT) -> None:
    """Check manifests as the API server would.

    Prints every mistake with file and line; the exit code is 40 if there is one.
    """
    with _mistakes_end_it():
        from qlora_cli import validate as check

        reports = [check.check_file(path) for path in jobs]
        typer.echo(check.as_json(reports) if output is Output.JSON else check.as_text(reports))
    raise typer.Exit(0 if all(report.good for report in reports) else USER_ERROR)


@app.command()
def plan(
    job: Job,
    *,
    gpu: GpuName = None,
    gpus: GpuCount = None,
    price: Price = None,
    tokens: Tokens = None,
    what_if: WhatIf = False,
    model_config: ModelConfig = None,
    overrides: Set = None,
    output: As = Output.TEXT,
) -> None:
    """Predict a job's memory and time.

    Reads the base's configuration and the headers of its weights, kilobytes of gigabytes; no GPU is needed. The exit
    code is 40 if it does not fit.
    """
    with _mistakes_end_it():
        import json

        from qlora_cli import plan as planning

        asked = planning.Options(gpu, gpus, price, tokens, what_if, model_config)
        answered = planning.answer(job, asked, tuple(overrides or ()))
        if output is Output.JSON:
            typer.echo(json.dumps(planning.as_dict(answered), indent=2))
        else:
            from qlora_cli import plan_view, render

            render.console().print(plan_view.show(answered))
    raise typer.Exit(0 if answered.fits else USER_ERROR)


@app.command()
def explain(field: FieldPath = "", output: As = Output.TEXT) -> None:
    """Explain a field of a QLoRAJob.

    Its type, default, bounds and meaning, whether it may change, and the rules it is part of.
    """
    with _mistakes_end_it():
        from qlora_cli import explain as explaining
        from qlora_cli import render

        entry = explaining.describe(field)
        if output is Output.JSON:
            typer.echo(explaining.as_json(entry))
        else:
            render.console().print(explaining.show(entry))


@app.command()
def crds() -> None:
    """Print the CustomResourceDefinition."""
    from qlora_api.crd import crd
    from qlora_cli import yamls

    sys.stdout.write(f"# Generated by 'make crds' from api/qlora_api. Do not edit.\n{yamls.dump(crd())}")


@app.command()
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
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Ask base, adapter and merged model the same.

    A prompt is put as it was in training: as a user's message of the chat template, or as an instruction in its frame.
    The answers are shown side by side.
    """
    with _mistakes_end_it():
        from qlora_cli import generate as asking
        from qlora_cli import render
        from qlora_cli.attempt import Commands

        models = asking.choose_models(adapter, run, runs_dir, base, merged)
        options = asking.Options(asking.prompts(prompt or (), prompts_file), max_new_tokens, sample, raw)
        code = asking.generate(models, options, render.console(), Commands(), runs_dir / run if run else None)
    raise typer.Exit(code)


@app.command()
def report(run: ReportOf, out: ReportFile = None, runs_dir: RunsDir = Path("runs")) -> None:
    """Write one page with all that is known of a run: curves, memory, data, attempts, configuration.

    RUN is a local run, finished or not, by name or folder, or the folder of a published adapter.
    """
    with _mistakes_end_it():
        from qlora_cli.report import write

        typer.echo(write(run, runs_dir, out))


registration.register(app)
