"""Task definitions of a user's own: YAML files as lm-evaluation-harness has them, without code.

The harness runs what a definition names: Python functions (``!function``), classes, metrics of the Hub. Here only
settings are taken, each known by name; templates are rendered in a sandbox (:mod:`qlora_trainer.tasks.harness`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qlora_trainer.tasks.harness_request import ANSWER_TYPES

MOST_BYTES = 1 << 20
"""Maximum size of one definition."""
FILE_FORMATS = ("json", "csv", "parquet", "arrow", "text")
"""Values of ``dataset_path`` for rows in the folder; others name a dataset of the Hub."""
SETTINGS = frozenset(
    {
        *("task", "task_alias", "tag", "metadata", "include", "output_type"),
        *("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"),
        *("description", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter"),
        *("fewshot_split", "fewshot_delimiter", "num_fewshot", "metric_list", "repeats"),
        *("should_decontaminate", "doc_to_decontamination_query"),
    }
)
METRIC_SETTINGS = frozenset({"metric", "aggregation", "higher_is_better"})
_NOT_TASKS = ("tag", "include", "repeats")


class DefinitionError(ValueError):
    """A definition cannot be used; ``str()`` completes the sentence about the folder."""


def read_definition(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the settings of the task ``name``, with those of the files that it includes; None where none has its name.

    Args:
        folder: of the definitions; paths of rows in them are relative to it.
        name: of the task.

    Raises:
        DefinitionError: a definition with that name cannot be used, or there are two.

    """
    found = [path for path in sorted(folder.rglob("*.y*ml")) if path.is_file() and _name_of(path) == name]
    if not found:
        return None
    if len(found) > 1:
        raise DefinitionError(f"defines {name} twice, in {' and '.join(p.name for p in found[:2])}")
    settings = _with_includes(found[0], folder, ())
    _check(settings, found[0].name)
    if settings["dataset_path"] in FILE_FORMATS:
        settings["dataset_kwargs"] = {
            **settings["dataset_kwargs"],
            "data_files": _inside(settings["dataset_kwargs"].get("data_files"), folder, found[0].name),
        }
    return {key: value for key, value in settings.items() if key not in _NOT_TASKS}


def _name_of(path: Path) -> str | None:
    """Return the task that a file defines; None where it cannot be read, or defines none."""
    try:
        return _read(path).get("task")
    except DefinitionError:
        # a file of another purpose; but one that means to be this task is read again, and its error raised
        text = path.read_bytes()[:MOST_BYTES].decode(errors="replace")
        lines = (line.partition(":") for line in text.splitlines())
        return next((value.strip().strip("'\"") for key, _, value in lines if key.strip() == "task"), None)


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise DefinitionError(f"has a {path.name} of more than {MOST_BYTES >> 20} MiB")
    try:
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DefinitionError(
            f"has a {path.name} that cannot be read as plain YAML: {reason}. Python code (!function) is not taken"
        ) from None
    if not isinstance(settings, dict):
        raise DefinitionError(f"has a {path.name} that is no mapping of settings")
    return settings


def _with_includes(path: Path, folder: Path, before: tuple[Path, ...]) -> dict[str, Any]:
    if path in before:
        raise DefinitionError(f"has a {path.name} that includes itself")
    settings = _read(path)
    named = settings.get("include", [])
    merged: dict[str, Any] = {}
    for include in named if isinstance(named, list) else [named]:
        other = (path.parent / str(include)).resolve()
        if not other.is_relative_to(folder.resolve()) or not other.is_file():
            raise DefinitionError(f"has a {path.name} that includes {include}, which is no file of the folder")
        merged |= _with_includes(other, folder, (*before, path))
    return merged | settings


def _check(settings: dict[str, Any], file: str) -> None:
    if unknown := sorted(str(key) for key in settings if key not in SETTINGS):
        raise DefinitionError(
            f"has a {file} with {', '.join(unknown)}; of a definition these are taken: {', '.join(sorted(SETTINGS))}"
        )
    if settings.get("output_type") not in ANSWER_TYPES:
        raise DefinitionError(
            f"has a {file} with output_type {settings.get('output_type')}; it must be one of {', '.join(ANSWER_TYPES)}"
        )
    for key in ("dataset_path", "doc_to_text", "doc_to_target"):
        if key not in settings or isinstance(settings[key], (dict, list)):
            raise DefinitionError(f"has a {file} without {key}, which must be text")
    for key, kinds in (("metric_list", list), ("dataset_kwargs", dict), ("metadata", dict)):
        if not isinstance(settings.setdefault(key, kinds()), kinds):
            raise DefinitionError(f"has a {file} whose {key} is no {kinds.__name__}")
    if unknown := sorted(set(settings["dataset_kwargs"]) - {"data_files", "field", "delimiter"}):
        raise DefinitionError(f"has a {file} whose dataset_kwargs has {', '.join(unknown)}; data_files is taken")
    if not settings["metric_list"]:
        del settings["metric_list"]
    for metric in settings.get("metric_list", ()):
        if not isinstance(metric, dict) or not isinstance(metric.get("metric"), str) or set(metric) - METRIC_SETTINGS:
            raise DefinitionError(
                f"has a {file} whose metric_list has {metric}; an entry has {', '.join(sorted(METRIC_SETTINGS))}"
            )


def _inside(files: Any, folder: Path, file: str) -> Any:
    """Return files of rows by their paths on this machine; all must be in the folder."""
    if isinstance(files, dict):
        return {str(split): _inside(value, folder, file) for split, value in files.items()}
    if isinstance(files, list):
        return [_inside(value, folder, file) for value in files]
    path = (folder / str(files)).resolve() if isinstance(files, str) else folder
    if not path.is_file() or not path.is_relative_to(folder.resolve()):
        raise DefinitionError(f"has a {file} whose dataset_kwargs.data_files names {files}, which is no file of it")
    return str(path)
