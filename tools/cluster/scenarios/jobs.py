"""QLoRAJobs for tests: a valid one, changed by group."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.api import ClusterApi, Object
    from cluster.control_plane import ControlPlane

CRDS = Path(__file__).parents[3] / "crds"
CRD = CRDS / "qlora.dev_qlorajobs.yaml"
GROUP = "/apis/qlora.dev/v1alpha1"


def serve_crd(cluster: ControlPlane) -> None:
    """Apply the CustomResourceDefinitions, and wait until they are served: a moment after ``Established``."""
    cluster.kubectl("apply", "-f", CRDS)
    wait_until_served(cluster.api)


def wait_until_served(api: ClusterApi) -> None:
    """Wait until QLoRAJobs and QLoRASweeps are handled and discovered."""
    for plural in ("qlorajobs", "qlorasweeps"):
        api.wait_for(f"{GROUP}/{plural}", bool, what=f"{plural} are served")
    api.wait_for(GROUP, lambda found: len({r["kind"] for r in found["resources"]}) == 2, what="both are discovered")


def qlora_job(name: str = "job", namespace: str = "default", workers: int = 1, **groups: Any) -> Object:
    """A valid manifest. ``groups`` are merged into those of the spec: ``policy={"maxRestarts": 0}``."""
    spec: dict[str, Any] = {
        "model": {"source": "s3://models/base"},
        "dataset": {"train": {"source": "s3://data/rows.jsonl"}, "format": "Text"},
        "training": {"maxSteps": 10, "globalBatchSize": 16},
        "parallelism": {"workers": workers},
        "output": {"destination": "s3://adapters/job"},
    }
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": merged(spec, groups),
    }


def merged(spec: Object, groups: Object) -> Object:
    """A spec with groups laid over its own, field by field."""
    fields = {
        group: {**spec.get(group, {}), **value} if isinstance(value, dict) else value for group, value in groups.items()
    }
    return {**spec, **fields}


def job_path(namespace: str, name: str = "job") -> str:
    return f"{GROUP}/namespaces/{namespace}/qlorajobs/{name}"


def in_state(state: str, reason: str | None = None) -> Any:
    """A condition for ``api.wait_for``: the job says it is in a state, and why."""

    def holds(job: Object) -> bool:
        status = job.get("status", {})
        return status.get("state") == state and reason in (None, status.get("reason"))

    return holds


def condition(job: Object, kind: str) -> Object:
    """A condition of a job; empty where it has none of that type."""
    return next((c for c in job.get("status", {}).get("conditions", ()) if c["type"] == kind), {})


def last_attempt(job: Object) -> Object:
    attempt: Object = job["status"]["attempts"][-1]
    return attempt


def create_job(api: ClusterApi, manifest: Object) -> str:
    """Create it; its path."""
    api.create(manifest)
    return job_path(manifest["metadata"]["namespace"], manifest["metadata"]["name"])
