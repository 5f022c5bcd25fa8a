"""Check whether the cluster's QLoRAJob and QLoRASweep are of this command line's version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.doctor.findings import Finding, fault, note, ok
from qlora_cli.kube.names import CRD, KIND, SWEEP_CRD, SWEEP_KIND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from qlora_cli.doctor.answer import Answer
    from qlora_cli.doctor.cluster_snapshot import ClusterSnapshot

SHOWN = 4


@dataclass(frozen=True)
class _Definition:
    """A CustomResourceDefinition of the operator."""

    check: str
    """Name of the check in the report."""
    name: str
    kind: str
    found: Answer
    schema: Callable[[], Mapping[str, Any]]
    """Returns the schema that this command line has."""
    missing: Callable[[str, str, str], Finding]
    """Makes the finding if the cluster does not have it."""


def crds(snapshot: ClusterSnapshot, install: str) -> Iterator[Finding]:
    """Check that each definition is there, served, and has the same fields. Without that of sweeps jobs still run."""
    yield from _check(_Definition("crd", CRD, KIND, snapshot.crd, own, fault), snapshot, install)
    sweeps = _Definition("sweeps", SWEEP_CRD, SWEEP_KIND, snapshot.sweep_crd, own_sweep, note)
    yield from _check(sweeps, snapshot, install)


def _check(definition: _Definition, snapshot: ClusterSnapshot, install: str) -> Iterator[Finding]:
    check, name, kinds = definition.check, definition.name, f"{definition.kind}s"
    if definition.found.denied:
        served = [r.get("kind") for r in (snapshot.served.value or {}).get("resources") or ()]
        if definition.kind in served:
            yield ok(check, f"{kinds} are served; you may not read their definition, so its version is not compared")
        else:
            yield definition.missing(check, f"this cluster serves no {kinds}", f"install the operator: {install}")
        return
    if not definition.found.there:
        text = f"the CustomResourceDefinition {name} is missing"
        yield definition.missing(check, text, f"install it with the operator: {install}")
        return
    body = definition.found.value
    bad = [
        c
        for c in (body.get("status") or {}).get("conditions") or ()
        if c["type"] == "Established" and c["status"] != "True"
    ]
    if bad:
        text = f"{name} is not established: {bad[0].get('message', '')}"
        yield fault(check, text, f"kubectl describe crd {name}")
        return
    theirs = _schema(body)
    lacking, foreign, changed = compare(definition.schema(), theirs)
    if lacking or changed:
        what = [f"lacks {_some(lacking)}"] if lacking else []
        what += [f"has other rules for {_some(changed)}"] if changed else []
        yield fault(
            check,
            f"the cluster's {name} is another version's: it {' and '.join(what)}",
            f"upgrade chart and command line to the same version: {install}",
        )
    elif foreign:
        yield note(
            check,
            f"the cluster's {name} is newer: this command line does not know {_some(foreign)}",
            "upgrade the command line",
        )
    else:
        yield ok(check, f"{name} is established and of this version")


def own() -> Mapping[str, Any]:
    """Return this command line's schema of a QLoRAJob."""
    from qlora_cli.manifest import crd_schema  # noqa: PLC0415 all API types

    return crd_schema.root()


def own_sweep() -> Mapping[str, Any]:
    """Return this command line's schema of a QLoRASweep."""
    from qlora_cli.manifest import crd_schema  # noqa: PLC0415 all API types

    return crd_schema.sweep_root()


def _schema(body: Mapping[str, Any]) -> Mapping[str, Any]:
    for version in body["spec"].get("versions") or ():
        if version.get("name") == "v1alpha1" and version.get("served"):
            found: Mapping[str, Any] = (version.get("schema") or {}).get("openAPIV3Schema") or {}
            return found
    return {}


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Fields that they lack, that we lack, and whose type, default or bounds differ. Words do not count."""
    mine, other = dict(_walk("", ours)), dict(_walk("", theirs))
    lacking = [path for path in mine if path not in other]
    foreign = [path for path in other if path not in mine]
    changed = [path for path, facts in mine.items() if path in other and other[path] != facts]
    return _tops(lacking), _tops(foreign), changed


def _walk(path: str, node: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    inner = node.get("items") or node
    for name, child in (inner.get("properties") or {}).items():
        here = f"{path}.{name}" if path else name
        facts = {
            key: child.get(key)
            for key in (
                "type",
                "default",
                "enum",
                "pattern",
                "minimum",
                "maximum",
                "minLength",
                "maxLength",
                "minItems",
                "maxItems",
            )
        }
        if "properties" in child:  # a group's default is that of its fields
            del facts["default"]
        rules = tuple(rule.get("rule") for rule in child.get("x-kubernetes-validations") or ())
        yield here, (facts, rules)
        yield from _walk(here, child)


def _tops(paths: list[str]) -> list[str]:
    """Without what lies below another one of them."""
    return [p for p in paths if not any(p.startswith(f"{q}.") for q in paths)]


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more
