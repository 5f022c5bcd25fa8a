"""Validate a spec as the API server does: strict fields, nulls, defaults, the structural schema, then CEL."""

from __future__ import annotations

import copy
import re

import cel

_PYTHON = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def refusals(spec, schema):
    """Return what the API server says of a new spec; nothing where it is taken. The spec is not changed."""
    spec = copy.deepcopy(spec)
    _set_defaults(spec, schema)
    return list(_structural(spec, schema, "spec")) or list(_rules(spec, schema, "spec"))


def _children(value, node):
    """Yield the name, value and schema of what is inside a value of the right type."""
    if isinstance(value, dict):
        for name, inner in value.items():
            child = node.get("properties", {}).get(name, node.get("additionalProperties"))
            if child:
                yield name, inner, child
    if isinstance(value, list) and "items" in node:
        yield from ((str(i), inner, node["items"]) for i, inner in enumerate(value))


def _set_defaults(value, node):
    """Drop nulls of fields and fill in defaults, as its ``PruneNonNullableNulls…`` and ``Default`` do."""
    if isinstance(value, dict) and "properties" in node:
        for name in [n for n, inner in value.items() if inner is None and n in node["properties"]]:
            del value[name]
        for name, child in node["properties"].items():
            if name not in value and "default" in child:
                value[name] = copy.deepcopy(child["default"])
    for _, inner, child in _children(value, node):
        _set_defaults(inner, child)


def _structural(value, node, path):
    if node.get("x-kubernetes-preserve-unknown-fields"):
        return
    kind = _PYTHON[node["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        yield f"{path}: must be of type {node['type']}"
        return
    if "oneOf" in node and sum(set(one["required"]) <= value.keys() for one in node["oneOf"]) != 1:
        yield f"{path}: must validate one and only one schema (oneOf)"
    if "enum" in node and value not in node["enum"]:
        yield f"{path}: unsupported value"
    if "pattern" in node and not re.search(node["pattern"].replace("$", r"\Z"), value):
        yield f"{path}: does not match"
    if not node.get("minimum", value) <= value <= node.get("maximum", value) if kind is int else False:
        yield f"{path}: out of bounds"
    if node.get("x-kubernetes-list-type") == "set" and len({repr(item) for item in value}) < len(value):
        yield f"{path}: duplicate value"
    for shortest, longest in (("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties")):
        if (shortest in node or longest in node) and not (
            node.get(shortest, 0) <= len(value) <= node.get(longest, len(value))
        ):
            yield f"{path}: has {len(value)}"
    if "properties" in node:
        yield from (f"{path}.{name}: unknown field" for name in value.keys() - node["properties"].keys())
        yield from (f"{path}.{name}: required" for name in set(node.get("required", ())) - value.keys())
    for name, inner, child in _children(value, node):
        yield from _structural(inner, child, f"{path}.{name}")


def _rules(value, node, path):
    for rule in node.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{path}: {rule['message']}"
    for name, inner, child in _children(value, node):
        yield from _rules(inner, child, f"{path}.{name}")
