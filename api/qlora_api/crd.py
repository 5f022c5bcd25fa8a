"""The CustomResourceDefinitions, generated from the types: structural schema, CEL rules, printer columns.

https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from qlora_api.base import Model
from qlora_api.errors import field_types, fields_of
from qlora_api.job import GROUP, KIND, VERSION, QLoRAJob
from qlora_api.spec import QLoRAJobSpec
from qlora_api.status import QLoRAJobStatus
from qlora_api.sweep.spec import MAX_TRIALS_TRANSITION, QLoRASweepSpec
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_api.sweep.sweep import SWEEP_KIND, QLoRASweep

PRINTER_COLUMNS = (
    ("State", "string", ".status.state", 0, "The condition that speaks for the job, or Pending."),
    ("Reason", "string", ".status.reason", 0, "Why it is in this state."),
    ("Step", "integer", ".status.progress.step", 0, "Optimizer steps done."),
    ("Loss", "string", ".status.progress.loss", 0, "Mean training loss of the last step."),
    ("ETA", "string", ".status.eta", 0, "Time left, by the steps so far."),
    ("Restarts", "integer", ".status.totalRestarts", 0, "Attempts after the first, whatever ended the ones before."),
    ("Memory", "string", ".status.peakMemory", 0, "Highest memory of a rank: of the GPU, or of the process on a CPU."),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Time since the job was created."),
    ("Steps", "integer", ".status.progress.totalSteps", 1, "Optimizer steps of the whole job."),
    ("Adapter", "string", ".status.adapter.uri", 1, "Address of the published adapter."),
)
"""Name, type, field, priority (1: with ``-o wide``) and description, in the order of ``kubectl get``."""
SELECTABLE_FIELDS = (".status.state", ".status.reason", ".spec.scheduling.queue")
"""For ``kubectl get qlorajobs --field-selector``."""

SWEEP_PRINTER_COLUMNS = (
    ("State", "string", ".status.state", 0, "The condition that speaks for the sweep, or Pending."),
    ("Reason", "string", ".status.reason", 0, "Why it is in this state."),
    ("Finished", "string", ".status.finished", 0, "Trials that have succeeded or failed, of all."),
    ("Running", "integer", ".status.trials.running", 0, "Trials that run, or wait for GPUs."),
    ("Failed", "integer", ".status.trials.failed", 0, "Trials that ended without an adapter."),
    ("Best", "string", ".status.best.name", 0, "The best trial that has succeeded."),
    ("Value", "string", ".status.best.value", 0, "Its value of the objective's metric."),
    ("GPU-Hours", "string", ".status.gpuHours", 0, "GPU-hours of all trials together."),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Time since the sweep was created."),
    ("Metric", "string", ".spec.objective.metric", 1, "The objective's metric."),
    ("Adapter", "string", ".status.best.adapter.uri", 1, "Address of the best trial's adapter."),
)
SWEEP_SELECTABLE_FIELDS = (".status.state", ".status.reason")

_NOT_STRUCTURAL = ("title", "$defs", "additionalProperties", "const", "anyOf", "$ref", "allOf")


@dataclass(frozen=True)
class _Kind:
    """One kind of object that the API server is to serve."""

    kind: str
    short_name: str
    columns: tuple[tuple[str, str, str, int, str], ...]
    selectable: tuple[str, ...]
    description: str | None
    name: dict[str, Any]
    spec: dict[str, Any]
    status: dict[str, Any]


def definitions() -> dict[str, dict[str, Any]]:
    """Return the CustomResourceDefinitions by the plural names of their kinds."""
    return {each["spec"]["names"]["plural"]: each for each in (crd(), sweep_crd())}


def crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition of QLoRAJobs as plain data."""
    return _definition(
        _Kind(
            KIND,
            "qlj",
            PRINTER_COLUMNS,
            SELECTABLE_FIELDS,
            QLoRAJob.__doc__,
            _name_schema(QLoRAJob, "ObjectMeta"),
            structural(QLoRAJobSpec),
            structural(QLoRAJobStatus),
        )
    )


def sweep_crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition of QLoRASweeps as plain data."""
    spec = structural(QLoRASweepSpec)
    spec["x-kubernetes-validations"].append(MAX_TRIALS_TRANSITION)
    return _definition(
        _Kind(
            SWEEP_KIND,
            "qls",
            SWEEP_PRINTER_COLUMNS,
            SWEEP_SELECTABLE_FIELDS,
            QLoRASweep.__doc__,
            _name_schema(QLoRASweep, "SweepMeta"),
            spec,
            structural(QLoRASweepStatus),
        )
    )


def _definition(kind: _Kind) -> dict[str, Any]:
    singular = kind.kind.lower()
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{singular}s.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": f"{singular}s",
                "singular": singular,
                "shortNames": [kind.short_name],
                "categories": ["all", "training"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "selectableFields": [{"jsonPath": path} for path in kind.selectable],
                    "additionalPrinterColumns": [
                        {
                            "name": name,
                            "type": type_,
                            "jsonPath": path,
                            "description": description,
                            **({"priority": 1} if priority else {}),
                        }
                        for name, type_, path, priority, description in kind.columns
                    ],
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "description": _words(kind.description),
                            "required": ["spec"],
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                "metadata": {"type": "object", "properties": {"name": kind.name}},
                                "spec": kind.spec,
                                # An object that no operator has seen has observedGeneration 0, which is not its own:
                                # for kstatus it is in progress. Without a status it would be as good as done.
                                "status": {**kind.status, "default": {}},
                            },
                        }
                    },
                }
            ],
        },
    }


def _name_schema(model: type[BaseModel], metadata: str) -> dict[str, Any]:
    schema = model.model_json_schema(by_alias=True)["$defs"][metadata]["properties"]["name"]
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
        validations = [{"rule": r.cel, "message": r.message, "fieldPath": f".{r.field}"} for r in model.rules if r.cel]
        validations += [
            {
                "rule": " && ".join(unchanged(name, field_types(model)[name], plain=_is_plain(model, name))),
                "message": f"{name} is immutable: {why}",
                "fieldPath": f".{name}",
            }
            for name, why in model.immutable.items()
        ]
        if validations:
            schema["x-kubernetes-validations"] = validations
    return schema


def unchanged(path: str, kind: type[BaseModel] | None, *, plain: bool = True) -> Iterator[str]:
    """Give CEL that holds where a field is as it was, but for what is exchangeable below it.

    Args:
        path: of the field.
        kind: its type.
        plain: it is always there.

    """
    if not plain:
        yield f"has(self.{path}) == has(oldSelf.{path}) && (!has(self.{path}) || self.{path} == oldSelf.{path})"
        return
    if kind is None or not issubclass(kind, Model) or not _has_exchangeable(kind):
        yield f"self.{path} == oldSelf.{path}"
        return
    for name, inner in field_types(kind).items():
        field = f"{path}.{name}"
        if name in kind.exchangeable:
            continue
        yield from unchanged(field, inner, plain=_is_plain(kind, name))


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
