"""``qlora generate``: what the base, the adapter and the merged model answer, side by side."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_cli.local import run_folder
from qlora_cli.local.trainer_process import environment, shell_code, tail
from qlora_cli.report import training_history
from qlora_cli.report.answers import AnswerLine, keep
from qlora_cli.report.facts import MANIFEST
from qlora_storage.local_paths import read_regular
from qlora_storage.published import ADAPTER, short_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, RenderableType

    from qlora_cli.local.trainer_process import Commands


class GenerateError(ValueError):
    """Nothing can be generated; ``str()`` says what to do."""


@dataclass(frozen=True)
class Models:
    """Models that answer."""

    base: str
    adapter: str
    merged: str | None = None
    dataset: str | None = None
    """``spec.dataset`` of the job as JSON, where it is known: prompts are put as in training."""
    revision: str = ""
    """Revision of the base that the adapter was trained on; empty if it is unknown or another base is given."""
    conversations: bool = False
    """By Prepare's receipt, the rows' prompts are lists of messages."""


@dataclass(frozen=True)
class GenerateOptions:
    prompts: tuple[str, ...]
    max_new_tokens: int
    sample: bool
    raw: bool = False
    """Prompts go to the models as they are."""


def choose_models(adapter: str | None, run: str | None, runs_dir: Path, base: str | None, merged: str | None) -> Models:
    """Choose the models that answer, from exactly one of an adapter and a run.

    Raises:
        GenerateError: both or neither, or they do not lead to a base and an adapter.

    """
    if (adapter is None) == (run is None):
        raise GenerateError("give one of --adapter DIR and --run NAME")
    if run is not None:
        return models_of_run(runs_dir, run, base, merged)
    return models_of_adapter(adapter or "", base, merged)


def prompts(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Prompts of the command line, then those of a file, one a line.

    Raises:
        GenerateError: there are none, or the file cannot be read.

    """
    from_file: list[str] = []
    if file is not None:
        try:
            from_file = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except OSError as error:
            raise GenerateError(f"{file}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise GenerateError(f"{file}: must be UTF-8, and is not at byte {error.start}") from None
    every = (*given, *from_file)
    if not every:
        raise GenerateError("give a prompt with --prompt TEXT or --prompts-file FILE")
    return every


def models_of_run(runs_dir: Path, name: str, base: str | None, merged: str | None) -> Models:
    """Return the base and the adapter of a finished run.

    Raises:
        GenerateError: no such run, or not finished.

    """
    record = run_folder.RunFolder(runs_dir / name).read()
    if record is None:
        there = sorted(p.parent.name for p in runs_dir.glob("*/run.json"))
        known = f"; there are {', '.join(there)}" if there else ""
        raise GenerateError(f'no run "{name}" in {runs_dir}{known}')
    if record.result is None or record.result.adapter is None:
        raise GenerateError(f"run \"{name}\" has no adapter yet; 'qlora run' with its manifest goes on with it")
    uri = record.result.adapter.uri
    beside = Path(uri).parent / "merged"  # the trainer publishes both in one folder
    merged = merged or (str(beside) if beside.is_dir() else None)
    dataset = json.dumps(record.spec.to_json_dict()["dataset"])
    conversations = record.receipt is not None and record.receipt.conversations
    revision = record.prepared.model_revision if record.prepared and not base else ""
    return Models(base or record.spec.model.source, uri, merged, dataset, revision, conversations)


def models_of_adapter(adapter: str, base: str | None, merged: str | None) -> Models:
    """Return an adapter, and the base that its manifest names, or else its own config.

    Raises:
        GenerateError: the base is not given and cannot be read from the adapter.

    """
    manifest = _manifest_of(Path(adapter))
    revision = ""
    if base is None:
        named = manifest.get("base")
        named = named if isinstance(named, dict) else {}
        base, revision = named.get("source"), str(named.get("revision") or "")
    if base is None:
        try:
            config = json.loads(read_regular(Path(adapter) / "adapter_config.json"))
            base = config["base_model_name_or_path"] or ""
        except KeyError:
            base = ""
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise GenerateError(
                f"{adapter}: its adapter_config.json cannot be read ({error}); name the base with --base"
            ) from None
    if not base or not isinstance(base, str):
        raise GenerateError(f"{adapter}: its adapter_config.json names no base; name it with --base")
    return Models(base, adapter, merged, _dataset_of(manifest), revision, _has_conversations(Path(adapter)))


def _manifest_of(adapter: Path) -> dict[str, Any]:
    """Return the manifest of an adapter where the trainer or 'qlora download' put it; empty where there is none."""
    real = Path(os.path.realpath(adapter))  # before Python 3.13, resolve() fails on a loop of links
    for folder in (real.parent, real.parent.parent):
        try:
            body = json.loads(read_regular(folder / MANIFEST))
            published = str(body.get("adapter", ADAPTER))
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if real in (folder / published, folder / short_path(published)):
            return dict(body)
    return {}


def _dataset_of(manifest: dict[str, Any]) -> str | None:
    """Return the dataset that a manifest names."""
    try:
        return json.dumps(manifest["config"]["dataset"])
    except (LookupError, TypeError):
        return None


def _has_conversations(adapter: Path) -> bool:
    """Return whether the history that the trainer published says that the rows were conversations."""
    try:
        history = training_history.of_file(adapter / training_history.PUBLISHED_FILE)
        return bool(history.end["receipt"]["conversations"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def command(start: Sequence[str], models: Models, options: GenerateOptions) -> list[str]:
    """Return the process that answers; ``--option=value``, so that a prompt may begin with dashes."""
    arguments = [*start, f"--base={models.base}", f"--adapter={models.adapter}"]
    arguments += [f"--revision={models.revision}"] if models.revision else []
    if models.dataset and not options.raw:
        arguments.append(f"--dataset={models.dataset}")
        arguments += ["--conversations"] if models.conversations else []
    if models.merged:
        arguments.append(f"--merged={models.merged}")
    arguments += [f"--prompt={prompt}" for prompt in options.prompts]
    arguments += [f"--max-new-tokens={options.max_new_tokens}", "--json"]
    return [*arguments, "--sample"] if options.sample else arguments


def generate(
    models: Models, options: GenerateOptions, console: Console, commands: Commands, folder: Path | None = None
) -> int:
    """Ask and show each answer as it comes, and keep it in ``folder``, a run's; the trainer's exit code."""
    told: list[AnswerLine] = []
    if models.dataset is None and not options.raw:
        console.print(f"No {MANIFEST} beside the adapter says how its rows were: prompts are put as they are.")
    if not console.is_terminal:
        console.print("Loading the models …")
    with tempfile.TemporaryFile("w+", errors="replace") as errors, console.status("Loading the models …") as status:
        process = subprocess.Popen(
            command(commands.generate, models, options),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=environment(),
        )
        with process:
            for answer in _answers(process.stdout or ()):
                console.print(show(answer))
                told.append(answer)
                status.update("Generating …")
        if folder is not None and told:
            keep(folder, told)
        if process.returncode:
            console.print(*tail(errors), sep="\n", soft_wrap=True)
            console.print(f"The trainer ended with exit code {shell_code(process.returncode)}.", style="bold red")
    return shell_code(process.returncode)


def show(answer: AnswerLine) -> RenderableType:
    """Columns for whoever answered."""
    table = Table(expand=True, box=None, padding=(0, 2, 0, 0), header_style="bold")
    texts = [(name, getattr(answer, name)) for name in ("base", "adapter", "merged")]
    given = [(name, text) for name, text in texts if text is not None]
    for name, _ in given:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(text.strip() or "(nothing)") for _, text in given))
    return Panel(table, title=Text(answer.prompt.strip()), title_align="left", border_style="dim")


def _answers(lines: Sequence[str] | IO[str]) -> Iterator[AnswerLine]:
    for line in lines:
        try:
            yield AnswerLine.model_validate_json(line)
        except ValidationError:
            continue  # a library's own print, not ours
