"""The reference of QLoRAJobs and QLoRASweeps, from the types: fields, conditions, reasons, exit codes.

python docs/generate.py          writes
python docs/generate.py --check  says what is stale, and fails
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / ".ci"))
from generated import write_or_check

from qlora_api import status
from qlora_api.base import DECIMAL_PATTERN
from qlora_api.contract import REASONS, ExitCode
from qlora_api.crd import PRINTER_COLUMNS, SWEEP_PRINTER_COLUMNS, structural
from qlora_api.lifecycle import STUCK, STUCK_ATTEMPTS, FinishJob, after_attempt
from qlora_api.spec import PolicySpec
from qlora_api.status import NAME_PATTERN, Attempt, ConditionType, MemoryComponent, Reason
from qlora_api.sweep.parameters import VARIABLE_FIELDS
from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_cli.manifest.explain import FieldEntry, describe

REFERENCE = Path(__file__).parent / "reference"
WRITTEN = "<!-- Written by 'make reference' from {source}. Do not edit. -->"
BEGINNING = (
    "`apiVersion: qlora.dev/v1alpha1`, `kind: QLoRAJob`, short name `qlj`. Every field; `qlora explain FIELD` and",
    "`kubectl explain qlorajob.spec` say the same. `metadata.name` has at most 52 characters, so that the names of its",
    "Jobs and pods are valid host names.",
    "",
    'Write a decimal in quotes, `"2e-4"`: Kubernetes APIs do not use floats. The API server',
    "rejects changes to immutable fields.",
)
SWEEP_BEGINNING = (
    "`apiVersion: qlora.dev/v1alpha1`, `kind: QLoRASweep`, short name `qls`: a search for the settings of a job, on a",
    "cluster or by `qlora sweep`;",
    "[how to](../guides/search-settings.md). `metadata.name` has at most 48 characters: trials are named after it.",
)
ENDS = (
    "The trainer sets the exit code; Kubernetes reports disruptions of the pod or node. *Counted* means counted",
    "against `policy.maxRestarts`. The delay before the next attempt grows from 1 s to 5 min; it applies after a",
    "counted attempt and after one that completed no step. `qlora run` follows the same table.",
    "",
    f"{STUCK_ATTEMPTS} attempts in a row that end as {' or '.join(f'`{reason}`' for reason in sorted(STUCK))}",
    "without a new step end the job.",
)
KILLED = 137
"""128 + SIGKILL. Only the kubelet's reason says that the pod ran out of memory."""
DECIDED = {
    Reason.UNSCHEDULABLE: "another attempt with fewer workers if `minWorkers` allows it; not counted",
    Reason.PAUSED: "another attempt once `policy.pauseAtStep` is raised or removed; not counted",
    Reason.SUSPENDED: "another attempt once the job is resumed; not counted",
    Reason.DEADLINE_EXCEEDED: "the job fails",
}
"""Consequences of the ends that the operator decides, which have no exit code."""


def generated() -> dict[Path, str]:
    """Return the content of every generated file."""
    return {
        REFERENCE / "qlorajob.md": _page(_fields()),
        REFERENCE / "conditions.md": _page(_conditions()),
        REFERENCE / "qlorasweep.md": _page(_sweep()),
    }


def _page(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


# -------------------------------------------------------------------------------------------------------------- fields


def _fields() -> Iterator[str]:
    yield WRITTEN.format(source="api/qlora_api/spec and status.py")
    yield from (
        "",
        "# QLoRAJob",
        "",
        *BEGINNING,
    )
    for top in ("spec", "status"):
        for group in _groups(describe(top)):
            yield from _group(group)
    yield from ("", "## What kubectl get shows", "", "| column | field |", "| --- | --- |")
    for name, _, path, wide, _ in PRINTER_COLUMNS:
        yield f"| {name.upper()}{' (with `-o wide`)' if wide else ''} | `{path.lstrip('.')}` |"
    yield from ("", "## Components of memory", "", "Keys of `status.memory` and `status.prepared.memory`.", "")
    yield from ("| component | meaning |", "| --- | --- |")
    for component in MemoryComponent:
        yield f"| `{component}` | {_cell(_meanings(MemoryComponent)[component])} |"


def _groups(entry: FieldEntry) -> Iterator[FieldEntry]:
    """Yield a group, then the groups in it."""
    yield entry
    for field in entry.fields:
        inner = describe(field.path.replace("[]", ""))
        if inner.fields:
            yield from _groups(inner)


def _group(group: FieldEntry) -> Iterator[str]:
    name = group.path + ("[]" if group.type.startswith("list") else "")
    yield from ("", f"## {name}", "")
    said = [group.doc] if group.doc else []
    if group.immutable and group.path.count(".") == 1:
        said.append(f"Immutable: {group.immutable}.")
    if said:
        yield from (" ".join(said), "")
    yield from ("| field | type | default | bounds | meaning |", "| --- | --- | --- | --- | --- |")
    for field in group.fields:
        short = field.path.rsplit(".", 1)[-1]
        inner = describe(field.path.replace("[]", ""))
        shown = (
            f"[{short}](#{_slug(field.path + ('[]' if field.type.startswith('list') else ''))})"
            if inner.fields
            else f"`{short}`"
        )
        cells = (shown, _type(field), _default(field, is_group=bool(inner.fields)), _bounds(field), field.doc)
        yield f"| {' | '.join(_cell(cell) for cell in cells)} |"
    rules = [rule for rule in group.rules if not any(rule in describe(f.path).rules for f in _nested(group))]
    if rules:
        yield from ("", *(f"- {rule}" for rule in rules))


def _nested(group: FieldEntry) -> Iterator[FieldEntry]:
    return (f for f in group.fields if f.type == "group")


def _slug(heading: str) -> str:
    """As GitHub and MyST make anchors of headings."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in "-_")


def _type(field: FieldEntry) -> str:
    if set(Reason) <= set(field.allowed):
        return "a [reason](conditions.md#reasons)"
    return ", ".join(f"`{json.dumps(v) if isinstance(v, bool) else v}`" for v in field.allowed) or field.type


def _default(field: FieldEntry, *, is_group: bool) -> str:
    if field.required:
        return "required"
    if is_group or field.default in (None, "", [], {}):
        return ""
    return f"`{field.default if isinstance(field.default, str) else json.dumps(field.default)}`"


def _bounds(field: FieldEntry) -> str:
    spelled = (b.replace("matches ", "matches `") + ("`" if b.startswith("matches ") else "") for b in field.bounds)
    return "; ".join(spelled)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


# -------------------------------------------------------------------------------------------------------------- sweeps


def _sweep() -> Iterator[str]:
    yield WRITTEN.format(source="api/qlora_api/sweep/spec.py, parameters.py and status.py")
    yield from ("", "# QLoRASweep", "", *SWEEP_BEGINNING)
    groups = (("spec", structural(QLoRASweepSpec)), ("status", structural(QLoRASweepStatus)))
    for path, group in (each for name, schema in groups for each in _sweep_groups(name, schema)):
        yield from ("", f"## {path}", "", group["description"], "")
        yield from ("| field | type | default | meaning |", "| --- | --- | --- | --- |")
        for name, field in group["properties"].items():
            default = "required" if name in group.get("required", ()) else _sweep_default(field)
            cells = (f"`{name}`", _sweep_type(field), default, field.get("description", ""))
            yield f"| {' | '.join(_cell(cell) for cell in cells)} |"
        if rules := [rule["message"] for rule in group.get("x-kubernetes-validations", ())]:
            yield from ("", *(f"- {rule}" for rule in rules))
    yield from ("", "## What kubectl get shows", "", "| column | field |", "| --- | --- |")
    for name, _, path, wide, _ in SWEEP_PRINTER_COLUMNS:
        yield f"| {name.upper()}{' (with `-o wide`)' if wide else ''} | `{path.lstrip('.')}` |"
    yield from ("", "## Fields that may vary", "", *(f"- `{path}`" for path in VARIABLE_FIELDS))


def _sweep_groups(path: str, schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give a group and the groups in it, but for the template's spec: that is a QLoRAJob's."""
    yield path, schema
    for name, field in schema["properties"].items():
        inner = field.get("items", field)
        if "properties" in inner and name not in ("spec", "conditions", "adapter"):
            yield from _sweep_groups(f"{path}.{name}{'[]' if 'items' in field else ''}", inner)


def _sweep_type(field: dict[str, Any]) -> str:
    if "enum" in field and len(field["enum"]) < len(VARIABLE_FIELDS):
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("pattern") == DECIMAL_PATTERN:
        return "decimal in quotes"
    if field["type"] == "integer":
        return f"whole number, {field['minimum']} to {field['maximum']}" if "maximum" in field else "whole number"
    if field.get("format") == "date-time":
        return "time"
    if field.get("pattern") == NAME_PATTERN:
        return "a [condition or reason](conditions.md)"
    return {"array": "list", "object": "group", "string": "text", "boolean": "`true`, `false`"}[field["type"]]


def _sweep_default(field: dict[str, Any]) -> str:
    default = field.get("default")
    if default in (None, "", []) or isinstance(default, dict):
        return ""
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


# ------------------------------------------------------------------------------------ conditions, reasons, exit codes


def _conditions() -> Iterator[str]:
    yield WRITTEN.format(source="api/qlora_api/status.py, contract.py and lifecycle.py")
    yield from ("", "# Conditions, reasons, exit codes", "", "## Conditions", "")
    yield "`status.state` is `Pending`, `Running`, `Suspended`, `Succeeded` or `Failed`; `status.reason` is its reason."
    yield from ("", "| condition | true when |", "| --- | --- |")
    for condition in ConditionType:
        yield f"| `{condition}` | {_cell(_meanings(ConditionType)[condition])} |"
    yield from (
        "",
        "## Reasons",
        "",
        "For conditions and ended attempts. Later versions may have more.",
        "",
    )
    yield from ("| reason | meaning |", "| --- | --- |")
    for reason in Reason:
        yield f"| `{reason}` | {_cell(_meanings(Reason)[reason])} |"
    yield from ("", "## How attempts end, and what follows", "")
    yield from ENDS
    yield from ("", "| reason | exit codes | what follows |", "| --- | --- | --- |")
    for reason in Reason:
        codes = sorted(int(code) for code, meant in REASONS.items() if meant is reason)
        if reason is Reason.CRASHED:
            codes = [int(ExitCode.CRASHED)]
        if codes or reason is Reason.NODE_LOST or reason in DECIDED:
            spelled = ", ".join(f"{code} with `OOMKilled`" if code == KILLED else str(code) for code in codes)
            spelled += " and any other" if reason is Reason.CRASHED else ""
            yield f"| `{reason}` | {spelled} | {DECIDED.get(reason) or _decision_after(reason)} |"


def _decision_after(reason: Reason) -> str:
    """Return what the decision function does after an attempt with this reason."""
    ended = Attempt(
        number=1,
        world_size=1,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        start_time=datetime(2026, 1, 1, tzinfo=UTC),
        last_step=1,
        reason=reason,
    )
    after = after_attempt(PolicySpec(), [ended])
    if isinstance(after, FinishJob):
        return "the job succeeds" if after.succeeded else "the job fails; another attempt would only repeat it"
    if after.batch.micro_batch_size < ended.micro_batch_size:
        return "another attempt with half the micro-batch, then with recomputed activations; not counted"
    if reason is Reason.CHECKPOINT_UNREADABLE:
        return "another attempt, which looks for an older intact checkpoint; counted"
    return f"another attempt from the last checkpoint; {'counted' if after.counted else 'not counted'}"


@cache
def _meanings(names: type[StrEnum]) -> dict[StrEnum, str]:
    """Return the strings below each member in the source."""
    classes = (n for n in ast.parse(inspect.getsource(status)).body if isinstance(n, ast.ClassDef))
    (body,) = (c.body for c in classes if c.name == names.__name__)
    found = {}
    for member, text in pairwise(body):
        if isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name):
            assert isinstance(text, ast.Expr), f"{names.__name__}.{member.targets[0].id} says nothing"
            found[names[member.targets[0].id]] = str(ast.literal_eval(text.value))
    return found


# ---------------------------------------------------------------------------------------------------------------- main


if __name__ == "__main__":
    sys.exit(write_or_check("The generated pages of the reference", generated(), "reference"))
