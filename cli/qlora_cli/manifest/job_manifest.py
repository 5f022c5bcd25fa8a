"""From a YAML file to a QLoRAJob, or to errors with file and line."""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_api import API_VERSION, KIND, QLoRAJob
from qlora_api.errors import FieldError, ManifestError
from qlora_api.job import GROUP
from qlora_cli.manifest import crd_schema
from qlora_cli.manifest.hub_names import bare_hub_names
from qlora_cli.text import kubernetes_yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from qlora_cli.text.kubernetes_yaml import Document


@dataclass(frozen=True)
class Located:
    """An error and where it stands."""

    place: str
    """``file:line``, or the option that set the field."""
    error: FieldError
    line: int = 0
    """0 for an option."""

    def __str__(self) -> str:
        return f"{self.place}: {self.error}"


class RefusedError(ValueError):
    """A manifest that cannot be used; ``str()`` has a line for each error, in the order of the manifest."""

    def __init__(self, *errors: Located | str) -> None:
        self.errors = in_order(errors)
        super().__init__("\n".join(str(m) for m in self.errors))


def in_order(errors: Iterable[Located | str]) -> tuple[Located | str, ...]:
    """Return the errors of one file by line; first those of no line."""
    return tuple(sorted(errors, key=lambda error: error.line if isinstance(error, Located) else 0))


@dataclass(frozen=True)
class Override:
    """A field set on the command line: ``--set training.maxSteps=10``."""

    path: str
    value: object


def documents(path: Path) -> list[Document]:
    """Return the documents of a file (``-``: standard input), at least one.

    Raises:
        RefusedError: no such file, not YAML, or nothing in it.

    """
    try:
        text = (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode("utf-8-sig")
        found = kubernetes_yaml.read(text, str(path))
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RefusedError(f"{path}: is not UTF-8 text") from None
    except kubernetes_yaml.NotYamlError as error:
        raise RefusedError(str(error)) from None
    if not found:
        raise RefusedError(f"{path}: holds no document")
    return found


def is_foreign(document: Document) -> bool:
    """Return whether a document is plainly of another kind, such as a Secret; a misspelled QLoRAJob is not."""
    value = document.value if isinstance(document.value, dict) else {}
    version, kind = value.get("apiVersion"), value.get("kind")
    if not (isinstance(version, str) and isinstance(kind, str)):
        return False
    return version.split("/")[0] != GROUP and "qlora" not in kind.lower()


def check(document: Document, overrides: Sequence[Override] = ()) -> QLoRAJob:
    """Validate one document.

    Raises:
        RefusedError: every error, each with file and line.

    """
    errors = list(document.errors)
    value = document.value
    if isinstance(value, dict):
        errors += missing_type(value, KIND)
        value = crd_schema.without_nulls(overridden(value, overrides))
        errors += bare_hub_names(value)
    try:
        job = QLoRAJob.from_manifest(value)
    except ManifestError as error:
        errors += error.errors
    if not errors:
        return job
    raise RefusedError(*(located(document, m, overrides) for m in errors)) from None


def missing_type(value: dict[str, Any], kind: str) -> list[FieldError]:
    """Return errors for a missing apiVersion or kind.

    kubectl cannot send an object without them; the types have defaults only for code that builds objects.
    """
    wanted = {"apiVersion": API_VERSION, "kind": kind}
    return [FieldError(name, None, f"is required: {want}") for name, want in wanted.items() if value.get(name) is None]


def one_job(path: Path, assignments: Sequence[str] = ()) -> QLoRAJob:
    """Return the only QLoRAJob of a file, with fields set on the command line.

    Raises:
        RefusedError: not exactly one, or with errors.

    """
    overrides = [parse_override(text) for text in assignments]
    ours = [d for d in documents(path) if not is_foreign(d)]
    if len(ours) != 1:
        lines = ", ".join(str(d.line) for d in ours)
        held = f"{len(ours)} QLoRAJobs (lines {lines})" if ours else f"no {KIND}"
        raise RefusedError(f"{path}: holds {held}; 'qlora run' takes exactly one")
    return check(ours[0], overrides)


def parse_override(text: str, schema: crd_schema.Schema | None = None) -> Override:
    """``training.maxSteps=10`` → path and value; null takes a field away.

    A field that holds a text takes the text as it is, so that decimals need no second pair of quotes. ``schema`` is
    that of the kind, if it is no QLoRAJob.

    Raises:
        RefusedError: no ``=``, or a value that is not YAML.

    """
    path, separator, raw = text.partition("=")
    path = path.strip()
    if not separator or not re.fullmatch(r"[A-Za-z]+(\.[A-Za-z]+)*", path):
        raise RefusedError(f'--set "{text}": must read path=value, such as training.maxSteps=10')
    found = crd_schema.way_to(path, schema)
    if found is None:  # validation names the field and what is known there
        outside_spec = path.split(".")[0] in (*(schema or crd_schema.root())["properties"], "metadata")
        full, kind = path if outside_spec else f"spec.{path}", "string"
    else:
        full, kind = found[0], found[1][-1].get("type", "object")
    if kind == "string" and raw not in ("null", "~"):
        return Override(full, raw)
    try:
        values = kubernetes_yaml.read(raw, f"--set {path}")
    except kubernetes_yaml.NotYamlError as error:
        raise RefusedError(str(error)) from None
    return Override(full, values[0].value if values else None)


def overridden(value: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """Return a manifest with fields set on the command line."""
    value = copy.deepcopy(value)
    for override in overrides:
        *groups, last = override.path.split(".")
        place: Any = value
        for name in groups:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        if override.value is None:
            place.pop(last, None)
        else:
            place[last] = override.value
    return value


def located(document: Document, error: FieldError, overrides: Sequence[Override] = ()) -> Located:
    """Return an error with the line of its field, or the option that set it."""
    for override in overrides:
        if error.field == override.path or error.field.startswith((f"{override.path}.", f"{override.path}[")):
            return Located("--set", error)
    line = document.line_of(error.field)
    return Located(f"{document.source}:{line}", error, line)
