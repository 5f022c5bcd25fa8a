"""``qlora init``: a manifest to begin with, from three answers; every comment in it is the API's own documentation."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from qlora_api.untrusted.printable import printable
from qlora_cli.kube.errors import ClusterError
from qlora_cli.manifest import crd_schema, job_manifest
from qlora_cli.manifest.local_model import positions_of_folder
from qlora_cli.manifest.local_rows import recognized_format
from qlora_cli.text import kubernetes_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WIDTH = 100
MAX_LENGTH = 2048
FORMATS = ("Messages", "PromptCompletion", "Instruction", "Text")
_SHOWN_WITH_DEFAULT = (
    "lora.rank",
    "lora.alpha",
    "lora.targetModules",
    "quantization.type",
    "training.schedule",
    "training.warmupSteps",
    "training.gradientCheckpointing",
    "parallelism.workers",
    "parallelism.gpusPerWorker",
    "parallelism.zeroStage",
    "checkpoint.everyMinutes",
    "policy.maxRestarts",
    "scheduling.queue",
)
_EXAMPLES: dict[str, object] = {"lora.targetModules": ["q_proj", "v_proj"], "scheduling.queue": "research"}
"""For fields without a default."""
GROUPS = (
    "model",
    "dataset",
    "quantization",
    "lora",
    "training",
    "parallelism",
    "checkpoint",
    "output",
    "policy",
    "scheduling",
)


@dataclass(frozen=True)
class Answers:
    """Values that a manifest cannot be without."""

    model: str
    data: str
    destination: str
    name: str = ""
    format: str = "Messages"
    credentials: str = ""


def text(answers: Answers) -> str:
    """Return the manifest.

    Raises:
        RefusedError: an answer is none that the API takes; the message names its field.

    """
    return manifest_text(answers.name or name_of(answers.data, answers.destination), _chosen(answers))


def manifest_text(name: str, chosen: dict[str, object], notes: Sequence[str] = ()) -> str:
    """Write a manifest.

    Args:
        name: of the job.
        chosen: values by path below ``spec``.
        notes: sentences that stand first, as comments.

    Raises:
        RefusedError: a value is none that the API takes; the message names its field.

    """
    lines = [
        *(line for note in notes for line in _comment(printable(note), 0)),
        "# A QLoRAJob: which base model, which rows, and where the adapter goes.",
        "# 'qlora explain FIELD' says more of every field, and lists those that are not here.",
        "apiVersion: qlora.dev/v1alpha1",
        "kind: QLoRAJob",
        "metadata:",
        f"  name: {name}",
        "spec:",
    ]
    for group in GROUPS:
        lines += _group(group, chosen)
    written = "\n".join(lines) + "\n"
    for document in kubernetes_yaml.read(written, "the manifest"):
        job_manifest.check(document)
    return written


def _chosen(answers: Answers) -> dict[str, object]:
    """Return the fields that are set, by path below spec."""
    chosen: dict[str, object] = {
        "model.source": answers.model,
        "dataset.train.source": answers.data,
        "dataset.eval.fraction": "0.05",
        "dataset.format": answers.format,
        "dataset.maxLength": min(MAX_LENGTH, positions_of_folder(answers.model) or MAX_LENGTH),
        "training.epochs": 2,
        "training.globalBatchSize": 16,
        "training.learningRate": "2e-4",
        "output.destination": answers.destination,
    }
    return chosen | credentials_of(answers)


def credentials_of(answers: Answers) -> dict[str, object]:
    """Return the fields that name the Secret: of each place that is reached with credentials."""
    places = (("model", answers.model), ("dataset.train", answers.data), ("output", answers.destination))
    return {
        f"{path}.credentials": answers.credentials
        for path, uri in places
        if answers.credentials and "://" in uri and not uri.startswith("pvc://")
    }


def name_of(data: str, destination: str) -> str:
    """Return a name for the job from what is at hand, in the letters that the API takes."""
    stem = PurePosixPath(destination.partition("://")[2] or destination).name or PurePosixPath(data).stem
    clean = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-")
    return clean or "my-adapter"


# -------------------------------------------------------------------------------------------------------------- writing


def _group(group: str, chosen: dict[str, object]) -> Iterator[str]:
    """Yield one group of the spec: what is set, then what may be, as comments with its default."""
    known = crd_schema.way_to(f"spec.{group}")
    if known is None:
        return
    tree = _tree({p: v for p, v in chosen.items() if p.startswith(f"{group}.")})
    extras = [path for path in _SHOWN_WITH_DEFAULT if path.startswith(f"{group}.") and path not in chosen]
    yield from _comment(str(known[1][-1].get("description", "")), 2)
    if tree:
        yield f"  {group}:"
        yield from _fields(tree[group], f"spec.{group}", 4)
    else:
        yield f"  # {group}:"
    for path in extras:
        yield from _extra(path, alone=not tree)


def _tree(flat: dict[str, object]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, last = path.split(".")
        place = tree
        for name in groups:
            place = place.setdefault(name, {})
        place[last] = value
    return tree


def _fields(tree: dict[str, Any], prefix: str, indent: int) -> Iterator[str]:
    for name, value in tree.items():
        path = f"{prefix}.{name}"
        yield from _comment(_doc(path), indent)
        if isinstance(value, dict):
            yield f"{' ' * indent}{name}:"
            yield from _fields(value, path, indent + 2)
        else:
            yield f"{' ' * indent}{name}: {_scalar(value)}"


def _extra(path: str, *, alone: bool) -> Iterator[str]:
    """A field that is not set, as a comment. ``alone``: its group is a comment too, one to take away as a whole."""
    found = crd_schema.way_to(f"spec.{path}")
    if found is None:
        return
    default = found[1][-1].get("default", _EXAMPLES.get(path))
    lead, mark = ("  #   ", "") if alone else ("    ", "# ")
    for line in _folded(_doc(f"spec.{path}"), WIDTH - 8):
        yield f"{lead}# {line}"
    yield f"{lead}{mark}{path.rsplit('.', 1)[-1]}: {_scalar(default)}"


def _doc(path: str) -> str:
    found = crd_schema.way_to(path)
    return str(found[1][-1].get("description", "")) if found else ""


def _comment(text: str, indent: int) -> Iterator[str]:
    for line in _folded(text, WIDTH - indent - 2):
        yield f"{' ' * indent}# {line}"


def _folded(text: str, room: int) -> list[str]:
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)


def _scalar(value: object) -> str:
    """Return a value on one line, quoted where YAML would take it for something else."""
    if isinstance(value, list):
        return "[" + ", ".join(str(v) for v in value) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    plain = re.fullmatch(r"[A-Za-z0-9/.][A-Za-z0-9_./:@+-]*", value) and not value.endswith(":")
    return value if plain and kubernetes_yaml.scalar(value) == value else json.dumps(value, ensure_ascii=False)


def ask(given: dict[str, str | None], prompt: object) -> Answers:
    """Answers from flags, and from a person for what no flag says.

    Raises:
        ClusterError: an answer is missing and there is nobody to ask.

    """
    questions = (
        ("model", "Base model (hf://org/name@revision, s3://…, or a folder)"),
        ("data", "Training rows (s3://…/rows.jsonl, hf://…, or a file)"),
        ("destination", "Where the adapter goes (s3://…, or a folder)"),
    )
    answers: dict[str, str] = {}
    for name, question in questions:
        answer = given.get(name)
        if not answer:
            if prompt is None:
                flags = ", ".join(f"--{key}" for key, _ in questions if not given.get(key))
                raise ClusterError(f"{flags}: needed where there is no terminal to ask on")
            answer = str(prompt(question)).strip()  # type: ignore[operator]
        answers[name] = answer
    recognized = recognized_format(answers["data"])
    more = {name: value for name in ("name", "format", "credentials") if (value := given.get(name))}
    more = {"format": recognized, **more} if recognized else more
    return Answers(**answers, **more)
