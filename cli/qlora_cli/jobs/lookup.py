"""From references on a command line to jobs and local runs, and from those to what one does next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.jobs.job_view import JobView, read_run, view, view_run
from qlora_cli.kube.target import Cluster, Target, connect, folder_hint, get_job, is_local, program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_cli.kube.api_client import Object


@dataclass(frozen=True)
class LookupResult:
    """Result of a reference: the API object, or a run's record."""

    body: Object
    view: JobView


def find(target: Target, references: Sequence[str]) -> list[LookupResult]:
    """Look up references, in their order; the cluster is asked only for those that are not paths.

    Raises:
        ClusterError: one is not there.

    """
    if all(is_local(reference) for reference in references):
        return [local_run(Path(reference)) for reference in references]
    with folder_hint(references), connect(target) as cluster:
        return find_in(cluster, references)


def find_in(cluster: Cluster, references: Sequence[str]) -> list[LookupResult]:
    """Look up references in a cluster that is connected.

    Raises:
        ClusterError: one is not there.

    """
    bodies = {name: get_job(cluster, name) for name in dict.fromkeys(references) if not is_local(name)}
    return [local_run(Path(r)) if is_local(r) else found_job(bodies[r]) for r in references]


def found_job(body: Object) -> LookupResult:
    return LookupResult(body, view(body))


def local_run(folder: Path) -> LookupResult:
    """Return a local run.

    Raises:
        ClusterError: there is none, or its record is damaged.

    """
    record = read_run(folder)
    return LookupResult({"folder": str(folder), **record}, view_run(folder, record))


def next_commands(job: JobView, target: Target) -> list[str]:
    """Return the commands to use next with a job in its state."""
    call, flags = program(), target.flags()
    if not job.namespace:
        return _next_locally(job, call)
    match job.state:
        case "Succeeded":
            return [f"{call} download {job.name}{flags}"]
        case "Failed":
            return [f"{call} logs {job.name}{flags}", f"{call} retry {job.name}{flags}"]
        case "Suspended":
            return [f"{call} resume {job.name}{flags}"]
        case "Running":
            return [f"{call} watch {job.name}{flags}", f"{call} logs {job.name} --follow{flags}"]
        case _ if job.needs_attention:
            return [f"{call} doctor{flags}", f"{call} events {job.name}{flags}"]
        case _:
            return [f"{call} watch {job.name}{flags}", f"{call} events {job.name}{flags}"]


def _next_locally(job: JobView, call: str) -> list[str]:
    if job.state == "Succeeded":
        return [f"{call} generate --run {job.name} --prompt …", f"{call} verify {job.place}"]
    if job.state == "Running":
        return [f"{call} logs {job.place}"]
    return [f"{call} logs {job.place}", f"{call} run JOB.yaml"]
