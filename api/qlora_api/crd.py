"""The CustomResourceDefinition, generated from the types: structural schema, CEL rules, printer columns.

https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from qlora_api.base import Model
from qlora_api.errors import field_types, fields_of
from qlora_api.job import GROUP, KIND, VERSION, QLoRAJob
from qlora_api.spec import QLoRAJobSpec
from qlora_api.status import QLoRAJobStatus

PRINTER_COLUMNS = (
    ("State", "string", ".status.state", 0, "The condition that speaks for the job, or Pending."),
    ("Reason", "string", ".status.reason", 0, "Why it is in this state."),
    ("Step", "integer", ".status.progress.step", 0, "Optimizer steps done."),
    ("Loss", "string", ".status.progress.loss", 0, "Mean training loss of the last step."),
    ("ETA", "string", ".status.eta", 0, "Time left, by the steps so far."),
    ("Restarts", "integer", ".status.totalRestarts", 0, "Attempts after the first, whatever ended the ones before."),
    ("GPU-Mem", "string", ".status.peakMemory", 0, "Highest memory of a rank that was measured."),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Time since the job was created."),
    ("Steps", "integer", ".status.progress.totalSteps", 1, "Optimizer steps of the whole job."),
    ("Adapter", "string", ".status.adapter.uri", 1, "Address of the published adapter."),
)
"""Name, type, field, priority (1: with ``-o wide``) and description, in the order of ``kubectl get``."""
SELECTABLE_FIELDS = (".status.state", ".status.reason", ".spec.scheduling.queue")
"""For ``kubectl get qlorajobs --field-selector``."""

_NOT_STRUCTURAL = ("title", "$defs", "additionalProperties", "const", "anyOf", "$ref", "allOf")


def crd() -> dict[str, Any]:
    """Return the whole CustomResourceDefinition as plain data."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"qlorajobs.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": "qlorajobs",
                "singular": "qlorajob",
                "shortNames": ["qlj"],
                "categories": ["all", "training"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "selectableFields": [{"jsonPath": path} for path in SELECTABLE_FIELDS],
                    "additionalPrinterColumns": [
                        {
                            "name": name,
                            "type": kind,
                            "jsonPath": path,
                            "description": description,
                            **({"priority": 1} if priority else {}),
                        }
                        for name, kind, path, priority, description in PRINTER_COLUMNS
                    ],
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "description": _words(QLoRAJob.__doc__),
                            "required": ["spec"],
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                "metadata": {"type": "object", "properties": {"name": _name_schema()}},
                                "spec": structural(QLoRAJobSpec),
                                # A job that no operator has seen has observedGeneration 0, which is not its own: for
                                # kstatus it is in progress. Without a status it would be as good as done.
                                "status": {**structural(QLoRAJobStatus), "default": {}},
                            },
                        }
                    },
                }
            ],
        },
    }


def _name_schema() -> dict[str, Any]:
    schema = QLoRAJob.model_json_schema(by_alias=True)["$defs"]["ObjectMeta"]["properties"]["name"]
    return {key: schema[key] for key in ("type", "maxLength", "pattern")}


def structural(model: type[BaseModel]) -> dict[str, Any]:
    """A type as a structural schema: no references, no unions, CEL for what crosses fields."""
    schema = model.model_json_schema(by_alias=True)
    return _with_rules(_structural(schema, schema.get("$defs", {})), model)


def _structural(node: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    node = _resolve(node, defs)
    out = {k: v for k, v in node.items() if k not in _NOT_STRUCTURAL}
    if "const" in node:
        out["enum"] = [node["const"]]
    if "description" in out:
        out["description"] = _words(out["description"])
    if "default" in out:
        out["default"] = _without_null(out["default"])
        if out["default"] is None:
            del out["default"]
    if "properties" in out:
        out["properties"] = {k: _structural(v, defs) for k, v in out["properties"].items()}
    if "items" in out:
        out["items"] = _structural(out["items"], defs)
    if isinstance(node.get("additionalProperties"), dict):
        out["additionalProperties"] = _structural(node["additionalProperties"], defs)
    if out.get("type") == "integer":
        out["format"] = "int64"
    return out


def _resolve(node: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """Follow references and take the one alternative of ``X | None``; what stands beside a reference wins."""
    while "$ref" in node or "anyOf" in node:
        beside = {k: v for k, v in node.items() if k not in ("$ref", "anyOf")}
        if "$ref" in node:
            node = {**defs[node["$ref"].rsplit("/", 1)[-1]], **beside}
        else:
            options = [_resolve(o, defs) for o in node["anyOf"] if o.get("type") != "null"]
            merged = dict(options[0])
            if len(options) > 1:  # an enum and a literal: their values together
                if "pattern" not in merged:  # a list that is open has one
                    merged["enum"] = [v for o in options for v in o.get("enum", [o.get("const")])]
                merged.pop("const", None)
                merged.pop("description", None)
            node = {**merged, **beside}
    return node


def _with_rules(schema: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    for name, inner in field_types(model).items():
        if inner is not None:
            place = schema["properties"][name]
            _with_rules(place.get("items", place), inner)
    if issubclass(model, Model):
        validations = [{"rule": r.cel, "message": r.message, "fieldPath": f".{r.field}"} for r in model.rules]
        validations += [
            {
                "rule": " && ".join(unchanged(name, field_types(model)[name])),
                "message": f"{name} is immutable: {why}",
                "fieldPath": f".{name}",
            }
            for name, why in model.immutable.items()
        ]
        if validations:
            schema["x-kubernetes-validations"] = validations
    return schema


def unchanged(path: str, kind: type[BaseModel] | None) -> Iterator[str]:
    """Give CEL that holds where a field is as it was, but for what is exchangeable below it."""
    if kind is None or not issubclass(kind, Model) or not _has_exchangeable(kind):
        yield f"self.{path} == oldSelf.{path}"
        return
    for name, inner in field_types(kind).items():
        field = f"{path}.{name}"
        if name in kind.exchangeable:
            continue
        if _is_plain(kind, name):
            yield from unchanged(field, inner)
        else:
            same = f"!has(self.{field}) || self.{field} == oldSelf.{field}"
            yield f"has(self.{field}) == has(oldSelf.{field}) && ({same})"


def _has_exchangeable(kind: type[BaseModel] | None) -> bool:
    if kind is None or not issubclass(kind, Model):
        return False
    return bool(kind.exchangeable) or any(map(_has_exchangeable, field_types(kind).values()))


def _is_plain(kind: type[BaseModel], name: str) -> bool:
    """Return whether a field is always there: it is required, or has a default."""
    field = fields_of(kind)[name]
    return field.is_required() or field.default is not None


def _without_null(value: Any) -> Any:
    """Drop what is unset: null is no value for the API server."""
    if isinstance(value, dict):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    return value


def _words(text: str | None) -> str:
    return " ".join((text or "").split())
