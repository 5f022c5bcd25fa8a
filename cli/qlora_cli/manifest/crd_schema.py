"""The CRD's schema as a tree to look things up in."""

from __future__ import annotations

import difflib
from functools import cache
from typing import TYPE_CHECKING, Any

from qlora_api.crd import crd, sweep_crd

if TYPE_CHECKING:
    from collections.abc import Iterator

Schema = dict[str, Any]


@cache
def root() -> Schema:
    """Return the schema of a whole QLoRAJob."""
    schema: Schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


@cache
def sweep_root() -> Schema:
    """Return the schema of a whole QLoRASweep."""
    schema: Schema = sweep_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def fields_of(schema: Schema) -> dict[str, Schema]:
    """Return the fields of a group, or of the groups in a list; none for anything else."""
    inner: Schema = schema.get("items", schema)
    fields: dict[str, Schema] = inner.get("properties", {})
    return fields


def way_to(path: str, schema: Schema | None = None) -> tuple[str, list[Schema]] | None:
    """Return the full path of a field and the schemas from the root to it, both ends included.

    ``lora.rank`` is taken for ``spec.lora.rank``, since most of what one asks about is in spec.
    """
    for full in (path, f"spec.{path}"):
        schemas = [schema or root()]
        for name in full.split("."):
            inner = fields_of(schemas[-1]).get(name.partition("[")[0])
            if inner is None:
                break
            schemas.append(inner)
        else:
            return full, schemas
    return None


def default_of(path: str) -> Any:
    """Return the default of a field that has one."""
    found = way_to(path)
    return found[1][-1]["default"] if found else None


def closest(path: str) -> list[str]:
    """Paths of fields whose path or last name looks like ``path``, best first."""
    every = list(_paths("", root()))
    leaf = path.rsplit(".", 1)[-1].lower()
    by_leaf: dict[str, list[str]] = {}
    for known in every:
        by_leaf.setdefault(known.rsplit(".", 1)[-1].lower(), []).append(known)
    found = difflib.get_close_matches(path, every, n=3, cutoff=0.75)
    for name in difflib.get_close_matches(leaf, by_leaf, n=3, cutoff=0.6):
        found += by_leaf[name]
    return list(dict.fromkeys(found))[:5]


def without_nulls(value: Any, schema: Schema | None = None) -> Any:
    """Drop nulls where there is a default, as the API server does before it applies defaults."""
    schema = root() if schema is None else schema
    if isinstance(value, list):
        return [without_nulls(inner, schema.get("items", {})) for inner in value]
    if not isinstance(value, dict):
        return value
    fields = fields_of(schema)
    return {
        name: without_nulls(inner, fields.get(name, {}))
        for name, inner in value.items()
        if inner is not None or "default" not in fields.get(name, {})
    }


def _paths(prefix: str, schema: Schema) -> Iterator[str]:
    for name, inner in fields_of(schema).items():
        yield f"{prefix}{name}"
        yield from _paths(f"{prefix}{name}.", inner)
