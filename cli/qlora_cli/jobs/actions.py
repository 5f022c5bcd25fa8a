"""Suspend, resume and cancel: the few things one changes in a job or sweep that is there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qlora_cli.jobs.job_view import view
from qlora_cli.kube.errors import ClusterError
from qlora_cli.kube.names import SWEEP_KIND, jobs_path, sweeps_path
from qlora_cli.kube.target import get_job_or_sweep, is_sweep, program
from qlora_cli.text.printable import write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster


def set_suspend(cluster: Cluster, name: str, *, suspend: bool) -> tuple[Object, bool]:
    """Set ``spec.suspend``; the job or sweep, and whether that changed anything.

    Raises:
        ClusterError: there is none, it is over, or it is a trial, which its sweep suspends and resumes.

    """
    body = get_job_or_sweep(cluster, name)
    current, kind = view(body), "sweep" if is_sweep(body) else "job"
    if current.is_finished:
        again = current.state == "Failed" and kind == "job"
        then = f"'{program()} retry {name}' makes a new one" if again else "there is nothing to do"
        raise ClusterError(f'{kind} "{current.name}" is over ({current.state}); {then}')
    if sweep := _sweep_of(body):
        raise ClusterError(
            f'job "{name}" is a trial of sweep "{sweep}", which suspends and resumes it; '
            f"'{program()} {'suspend' if suspend else 'resume'} qlorasweep/{sweep}' is for all its trials"
        )
    if current.suspend == suspend:
        return body, False
    return cluster.api.merge(_path(body), {"spec": {"suspend": suspend}}), True


def _sweep_of(job: Object) -> str:
    """Return the name of the sweep that controls a job; empty where none does."""
    owners = job["metadata"].get("ownerReferences") or ()
    return next((o["name"] for o in owners if o.get("controller") and o.get("kind") == SWEEP_KIND), "")


def _path(body: Object) -> str:
    meta = body["metadata"]
    return (sweeps_path if is_sweep(body) else jobs_path)(meta["namespace"], meta["name"])


def jobs_to_delete(cluster: Cluster, names: Sequence[str]) -> list[Object]:
    """Return the jobs and sweeps to be deleted.

    Raises:
        ClusterError: one of them is not there; nothing was deleted.

    """
    return [get_job_or_sweep(cluster, name) for name in dict.fromkeys(names)]


def describe(job: Object) -> str:
    """Describe what is lost with a job or sweep, in a line."""
    current = view(job)
    if is_sweep(job):
        running = (job.get("status") or {}).get("trials", {}).get("running", 0)
        trials = f"its trials are deleted with it{f', {running} of them run' if running else ''}"
        return f"{current.namespace}/{current.name}  sweep, {current.state}; {trials}; published adapters stay"
    at = f" at step {current.step} of {current.total_steps}" if current.step and not current.is_finished else ""
    kept = {
        "Succeeded": f"its adapter stays at {current.adapter.get('uri', 'its destination')}",
        "Failed": "its checkpoints stay at its destination, but no other job resumes from them",
    }.get(current.state, "its GPUs are freed after a last checkpoint; no other job resumes from it")
    if sweep := _sweep_of(job):
        kept = f"it is a trial of sweep {sweep}, which creates it again"
    return f"{current.namespace}/{current.name}  {current.state}{at}; {kept}"


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
    cluster.api.delete(_path(job))
