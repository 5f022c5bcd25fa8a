"""Check whether the cluster's QLoRAJob is this command line's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_cli.doctor.findings import Finding, fault, note, ok
from qlora_cli.kube.names import CRD, KIND

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from qlora_cli.doctor.cluster_snapshot import ClusterSnapshot

SHOWN = 4


def crd(snapshot: ClusterSnapshot, install: str) -> Iterator[Finding]:
    """There, served, and with the same fields."""
    if snapshot.crd.denied:
        kinds = [r.get("kind") for r in (snapshot.served.value or {}).get("resources") or ()]
        if KIND in kinds:
            yield ok("crd", "QLoRAJobs are served; you may not read their definition, so its version is not compared")
        else:
            yield fault("crd", "this cluster serves no QLoRAJobs", f"install the operator: {install}")
        return
    if not snapshot.crd.there:
        yield fault("crd", f"the CustomResourceDefinition {CRD} is missing", f"install it with the operator: {install}")
        return
    body = snapshot.crd.value
    bad = [
        c
        for c in (body.get("status") or {}).get("conditions") or ()
        if c["type"] == "Established" and c["status"] != "True"
    ]
    if bad:
        yield fault("crd", f"{CRD} is not established: {bad[0].get('message', '')}", f"kubectl describe crd {CRD}")
        return
    theirs = _schema(body)
    lacking, foreign, changed = compare(own(), theirs)
    if lacking or changed:
        what = [f"lacks {_some(lacking)}"] if lacking else []
        what += [f"has other rules for {_some(changed)}"] if changed else []
        yield fault(
            "crd",
            f"the cluster's {CRD} is another version's: it {' and '.join(what)}",
            f"upgrade chart and command line to the same version: {install}",
        )
    elif foreign:
        yield note(
            "crd",
            f"the cluster's {CRD} is newer: this command line does not know {_some(foreign)}",
            "upgrade the command line",
        )
    else:
        yield ok("crd", f"{CRD} is established and of this version")


def own() -> Mapping[str, Any]:
    """This command line's schema."""
    from qlora_cli.manifest import crd_schema  # noqa: PLC0415 all API types

    return crd_schema.root()


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
