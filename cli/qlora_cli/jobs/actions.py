"""Suspend, resume and cancel: the few things one changes in a job that is there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qlora_cli.jobs.job_view import view
from qlora_cli.kube.errors import ClusterError
from qlora_cli.kube.names import jobs_path
from qlora_cli.kube.target import get_job, program
from qlora_cli.text.printable import write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster


def set_suspend(cluster: Cluster, name: str, *, suspend: bool) -> tuple[Object, bool]:
    """Set ``spec.suspend``; the job, and whether that changed anything.

    Raises:
        ClusterError: no such job, or it is over.

    """
    job = get_job(cluster, name)
    seen = view(job)
    if seen.is_finished:
        then = f"'{program()} retry {name}' makes a new one" if seen.state == "Failed" else "there is nothing to do"
        raise ClusterError(f'job "{name}" is over ({seen.state}); {then}')
    if seen.suspend == suspend:
        return job, False
    return cluster.api.merge(jobs_path(cluster.namespace, name), {"spec": {"suspend": suspend}}), True


def jobs_to_delete(cluster: Cluster, names: Sequence[str]) -> list[Object]:
    """Return the jobs to be deleted.

    Raises:
        ClusterError: one of them is not there; nothing was deleted.

    """
    return [get_job(cluster, name) for name in dict.fromkeys(names)]


def describe(job: Object) -> str:
    """Describe what is lost with a job, in a line."""
    seen = view(job)
    at = f" at step {seen.step} of {seen.total_steps}" if seen.step and not seen.is_finished else ""
    kept = {
        "Succeeded": f"its adapter stays at {seen.adapter.get('uri', 'its destination')}",
        "Failed": "its checkpoints stay at its destination, but no other job resumes from them",
    }.get(seen.state, "its GPUs are freed after a last checkpoint; no other job resumes from it")
    return f"{seen.namespace}/{seen.name}  {seen.state}{at}; {kept}"


def confirm(question: str, *, yes: bool) -> bool:
    """Ask, unless told yes.

    Raises:
        ClusterError: there is nobody to ask.

    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ClusterError("--yes: needed where there is no terminal to ask on")
    write(f"{question} [y/N] ", error=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def delete(cluster: Cluster, job: Object) -> None:
    """Delete it; its pods end with a checkpoint."""
    meta = job["metadata"]
    cluster.api.delete(jobs_path(meta["namespace"], meta["name"]))
