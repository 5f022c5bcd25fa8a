"""Check the profiles of the operator's chart: whether nodes offer what they ask for, and whether jobs name them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_api.profile_names import DEFAULT_PROFILE
from qlora_cli.doctor.findings import Finding, fault, note, ok, unknown
from qlora_cli.jobs.job_view import view

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qlora_cli.doctor.cluster_snapshot import ClusterSnapshot
    from qlora_cli.kube.api_client import Object


def profiles(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    """Give the profiles that jobs may name, those without a node, and jobs that name another."""
    if not snapshot.config.there:
        return
    known: Mapping[str, Any] = snapshot.config.value.get("profiles") or {}
    bad = list(_jobs(snapshot, {DEFAULT_PROFILE, *known}))
    yield from bad
    if not known:
        return
    lacking = (
        []
        if snapshot.nodes.denied
        else [n for n, p in known.items() if not any(_fits(node, p, snapshot) for node in snapshot.nodes.items)]
    )
    for name in lacking:
        yield note(
            "profiles",
            f"no node has the labels and GPUs of profile {name} ({_asked(known[name], snapshot)})",
            "its jobs wait until there is one, as an autoscaler may bring; or correct the profile in the chart",
        )
    if snapshot.nodes.denied:
        yield unknown("profiles", f"you may not list nodes; jobs may name {_list(known)}")
    elif not bad and not lacking:
        yield ok("profiles", f"jobs may name {_list(known)}")


def _jobs(snapshot: ClusterSnapshot, known: set[str]) -> Iterator[Finding]:
    for job in (*snapshot.manifests, *snapshot.jobs.items):
        name = ((job.get("spec") or {}).get("scheduling") or {}).get("profile")
        if name is not None and name not in known and not view(job).is_finished:
            yield fault(
                "profiles",
                f'job "{job["metadata"]["name"]}" names profile {name}, and there are {", ".join(sorted(known))}',
                "correct its spec.scheduling.profile, or have the profile added to the chart",
            )


def _list(known: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name} ({text})" if (text := p.get("description") or p.get("gpu")) else name for name, p in known.items()
    )


def _resource(profile: Mapping[str, Any], snapshot: ClusterSnapshot) -> str:
    own = profile.get("gpuResource")
    return str((snapshot.config.value.get("gpuResource") or "") if own is None else own)


def _asked(profile: Mapping[str, Any], snapshot: ClusterSnapshot) -> str:
    labels = [f"{key}={value}" for key, value in (profile.get("nodeSelector") or {}).items()]
    return ", ".join(filter(None, [*labels, _resource(profile, snapshot)]))


def _fits(node: Object, profile: Mapping[str, Any], snapshot: ClusterSnapshot) -> bool:
    """Return whether a node has the labels of a profile, and any of its GPUs."""
    labels = node["metadata"].get("labels") or {}
    wanted, resource = profile.get("nodeSelector") or {}, _resource(profile, snapshot)
    offered = (node.get("status") or {}).get("allocatable") or {}
    return wanted.items() <= labels.items() and (not resource or str(offered.get(resource, "0")) != "0")
