"""``qlora explain``: what a field means, what it takes, whether it may change. All of it comes from the API types."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qlora_api.base import DECIMAL_PATTERN
from qlora_cli.manifest import crd_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from qlora_cli.manifest.crd_schema import Schema

_RULES = "x-kubernetes-validations"


class UnknownFieldError(ValueError):
    """No such field; ``str()`` names the closest ones."""

    def __init__(self, path: str) -> None:
        close = crd_schema.closest(path)
        hint = f"; closest: {', '.join(close)}" if close else "; 'qlora explain' lists the groups"
        super().__init__(f'"{path}" is not a field of QLoRAJob{hint}')


@dataclass(frozen=True)
class FieldEntry:
    """All that is known of one field."""

    path: str
    type: str
    required: bool
    doc: str = ""
    default: object = None
    bounds: tuple[str, ...] = ()
    allowed: tuple[object, ...] = ()
    immutable: str = ""
    """Reason why the field is immutable after creation; empty if it may change."""
    rules: tuple[str, ...] = ()
    """Rules that cross fields, in words."""
    fields: tuple[FieldEntry, ...] = ()

    def to_json_dict(self) -> dict[str, Any]:
        """Return the entry as plain data, empty parts left out."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["fields"] = [entry.to_json_dict() for entry in self.fields]
        return {name: value for name, value in plain.items() if value not in (None, "", (), [])}


def describe(path: str = "") -> FieldEntry:
    """Explain a field, or a group with its fields; without a path, the spec.

    Raises:
        UnknownFieldError: names the closest fields.

    """
    way = crd_schema.way_to(path or "spec")
    if way is None:
        raise UnknownFieldError(path)
    full, schemas = way
    entry = _entry(full, schemas)
    inner = schemas[-1]
    fields = tuple(
        _entry(f"{entry.path}{'[]' if 'items' in inner else ''}.{name}", [*schemas, child])
        for name, child in crd_schema.fields_of(inner).items()
    )
    return FieldEntry(**{**entry.__dict__, "fields": fields})


def _entry(path: str, schemas: list[Schema]) -> FieldEntry:
    own, parent = schemas[-1], schemas[-2]
    required = parent.get("items", parent).get("required", [])
    default = None if crd_schema.fields_of(own) else own.get("default")
    return FieldEntry(
        path=path,
        type=_type(own),
        required=path.rsplit(".", 1)[-1] in required,
        doc=own.get("description", "") or own.get("items", {}).get("description", ""),
        default=default,
        bounds=tuple(_bounds(own)),
        allowed=tuple(own.get("enum", ())),
        immutable=_immutable(path, schemas),
        rules=tuple(_crossing(path, schemas)),
    )


def _type(own: Schema) -> str:
    if own.get("pattern") == DECIMAL_PATTERN:
        return "decimal in quotes"
    if own["type"] == "array":
        return f"list of {_type(own['items'])}s"
    if isinstance(own.get("additionalProperties"), dict):
        return f"map of {_type(own['additionalProperties'])}s"
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "object": "group"}
    return words[own["type"]]


def _bounds(own: Schema) -> Iterator[str]:
    kinds = (
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " items"),
        ("minProperties", "maxProperties", " entries"),
    )
    rules = [rule["message"] for rule in own.get(_RULES, ()) if own["type"] not in ("object", "array")]
    yield from rules
    if own.get("pattern") == DECIMAL_PATTERN:  # its rule says more
        return
    for low, high, unit in kinds:
        if low in own and high in own:
            yield f"{own[low]} to {own[high]}{unit}"
        elif low in own:
            yield f"at least {own[low]}{unit}"
        elif high in own:
            yield f"at most {own[high]}{unit}"
    if "pattern" in own:
        yield f"matches {own['pattern']}"


def _levels(path: str, schemas: list[Schema]) -> Iterator[tuple[str, Schema]]:
    """Each rule on the way to a field, with the path of the group that carries it."""
    names = path.split(".")
    for depth, around in enumerate(schemas):
        for rule in around.get("items", around).get(_RULES, ()):
            if around.get("type") != "string":
                yield ".".join(names[:depth]), rule


def _immutable(path: str, schemas: list[Schema]) -> str:
    for group, rule in _levels(path, schemas):
        target, inside = f"{group}{rule.get('fieldPath', '')}", path.removeprefix(f"{group}.")
        if "oldSelf" in rule["rule"] and (path == target or _compares(rule["rule"], inside)):
            return str(rule["message"]).split("immutable: ", 1)[-1]
    return ""


def _compares(rule: str, path: str) -> bool:
    """Return whether a rule compares a field, or a group that it is in, with what it was."""
    compared = set(re.findall(r"oldSelf\.([\w.]+)", rule))
    names = path.split(".")
    return any(".".join(names[: depth + 1]) in compared for depth in range(len(names)))


def _crossing(path: str, schemas: list[Schema]) -> Iterator[str]:
    """Rules that name the field, or lie within the group."""
    for group, rule in _levels(path, schemas):
        if "oldSelf" in rule["rule"]:
            continue
        named = {f"{group}.{name}" for name in re.findall(r"self\.([A-Za-z.]*[A-Za-z])", rule["rule"])}
        named.add(f"{group}{rule.get('fieldPath', '')}")
        if group == path or any(name == path or name.startswith(f"{path}.") for name in named):
            yield rule["message"]


# ------------------------------------------------------------------------------------------------------------- to show


def as_json(entry: FieldEntry) -> str:
    return json.dumps(entry.to_json_dict(), indent=2, ensure_ascii=False)


def show(entry: FieldEntry) -> RenderableType:
    """An entry as a page."""
    facts = Table.grid(padding=(0, 3))
    for label, value in _facts(entry):
        facts.add_row(Text(label, style="dim"), value)
    parts: list[RenderableType] = [Text(entry.path, style="bold"), *([entry.doc] if entry.doc else []), facts]
    if entry.fields:
        table = Table("Field", "Type", "Default", "Meaning", box=None, padding=(0, 2, 0, 0), header_style="dim")
        for inner in entry.fields:
            table.add_row(inner.path.rsplit(".", 1)[-1], _short_type(inner), _default(inner), inner.doc)
        parts += ["", table]
    return Group(*parts)


def _facts(entry: FieldEntry) -> Iterator[tuple[str, str]]:
    yield "Type", _short_type(entry)
    if not entry.fields:
        yield "Default", _default(entry)
    if entry.bounds:
        yield "Bounds", "; ".join(entry.bounds)
    if entry.path.split(".")[0] == "spec":
        yield "Changes", f"immutable: {entry.immutable}" if entry.immutable else "may change while the job runs"
    for rule in entry.rules:
        yield "Rule", rule


def _short_type(entry: FieldEntry) -> str:
    if not entry.allowed:
        return entry.type
    values = ", ".join(str(value) for value in entry.allowed)
    return f"one of {values}"


def _default(entry: FieldEntry) -> str:
    if entry.required:
        return "required"
    if entry.default is None:
        return "" if entry.type == "group" else "not set"
    return (
        entry.default
        if entry.default and isinstance(entry.default, str)
        else json.dumps(entry.default, ensure_ascii=False)
    )
