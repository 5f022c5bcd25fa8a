"""Resolve flags to a client, a namespace, and the jobs or local runs that are named."""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.kube.errors import ClusterError, KubeApiError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from qlora_cli.kube.api_client import ApiClient, Object

PROGRAM, PLUGIN = "qlora", "kubectl-qlora"
SWEEP_REFERENCES = ("qlorasweep/", "qlorasweep.qlora.dev/")
"""Before the name of a sweep that is meant and no job, as kubectl reads and writes it."""


@dataclass(frozen=True)
class Target:
    """The flags that kubectl has too."""

    kubeconfig: Path | None = None
    context: str | None = None
    namespace: str | None = None

    def flags(self) -> str:
        """Return the flags again, for a command that is suggested."""
        given = (("--kubeconfig", self.kubeconfig), ("--context", self.context), ("-n", self.namespace))
        return "".join(f" {name} {value}" for name, value in given if value)


@dataclass(frozen=True)
class Cluster:
    """A client, and the namespace that is meant."""

    api: ApiClient
    namespace: str
    context: str = ""


@contextmanager
def connect(target: Target) -> Iterator[Cluster]:
    """Open the way to the cluster; nothing is asked of it yet.

    Raises:
        ClusterError: no way is configured, or its credentials cannot be had.

    """
    from qlora_cli.kube import kubeconfig  # noqa: PLC0415 only commands that need a cluster load this
    from qlora_cli.kube.api_client import ApiClient  # noqa: PLC0415

    access = kubeconfig.load(target.kubeconfig, target.context)
    with ApiClient(access) as api:
        yield Cluster(api, target.namespace or access.namespace, access.context)


def program() -> str:
    """Return how this command line is called, for suggestions: by its path where no ``qlora`` is on PATH."""
    called = Path(sys.argv[0])
    if called.name.startswith(PLUGIN):
        return "kubectl qlora"
    return str(called) if called.name == PROGRAM and shutil.which(PROGRAM) is None else PROGRAM


def is_local(reference: str) -> bool:
    """Return whether a reference names a local run: a path. Names of jobs have no slash."""
    return ("/" in reference or reference in (".", "..")) and not reference.startswith(SWEEP_REFERENCES)


@contextmanager
def folder_hint(references: Iterable[str]) -> Iterator[None]:
    """Add to an error of the cluster how to name a folder of this machine that is called like a job.

    Raises:
        ClusterError: the error.

    """
    try:
        yield
    except ClusterError as error:
        for name in references:
            if not is_local(name) and Path(name).is_dir():
                error.add_note(f'"{name}" names a job; the folder here is ./{name}')
        raise


def get_job(cluster: Cluster, name: str) -> Object:
    """Return one job.

    Raises:
        ClusterError: there is none of this name, and these are there.

    """
    from qlora_cli.kube.names import jobs_path  # noqa: PLC0415

    found = _find(cluster, jobs_path(cluster.namespace, name), name)
    if found is None:
        raise ClusterError(_not_there(cluster, name, {"job": jobs_path(cluster.namespace)}))
    return found


def get_job_or_sweep(cluster: Cluster, reference: str) -> Object:
    """Return the job of a name, or the sweep where there is no such job; of ``qlorasweep/NAME`` the sweep.

    Raises:
        ClusterError: there is neither, and these are there.

    """
    from qlora_cli.kube.names import jobs_path, sweeps_path  # noqa: PLC0415

    if reference.startswith(SWEEP_REFERENCES):
        return get_sweep(cluster, reference)
    jobs, sweeps = jobs_path(cluster.namespace), sweeps_path(cluster.namespace)
    found = _find(cluster, f"{jobs}/{reference}", reference)
    if found is None:
        with suppress(KubeApiError):  # a chart without sweeps, or a role that may not read them
            found = _find(cluster, f"{sweeps}/{reference}", reference)
    if found is None:
        raise ClusterError(_not_there(cluster, reference, {"job": jobs, "sweep": sweeps}))
    return found


def get_sweep(cluster: Cluster, reference: str) -> Object:
    """Return one sweep, by its name or as ``qlorasweep/NAME``.

    Raises:
        ClusterError: there is none of this name, and these are there.

    """
    from qlora_cli.kube.names import sweeps_path  # noqa: PLC0415

    name = reference.rpartition("/")[2]
    found = _find(cluster, sweeps_path(cluster.namespace, name), name)
    if found is None:
        raise ClusterError(_not_there(cluster, name, {"sweep": sweeps_path(cluster.namespace)}))
    return found


def is_sweep(body: Object) -> bool:
    """Return whether an object that was asked for by its name is a QLoRASweep."""
    from qlora_cli.kube.names import SWEEP_KIND  # noqa: PLC0415

    return body.get("kind") == SWEEP_KIND


def _find(cluster: Cluster, path: str, name: str) -> Object | None:
    """Return an object; None where there is none of its name."""
    try:
        return cluster.api.get(path)
    except KubeApiError as error:
        if error.not_found and error.message and f'"{name}" not found' in error.message:
            return None
        raise


def _not_there(cluster: Cluster, name: str, paths: Mapping[str, str]) -> str:
    """Name the closest ones."""
    import difflib  # noqa: PLC0415

    there: list[str] = []
    for path in paths.values():
        with suppress(ClusterError):
            there += [item["metadata"]["name"] for item in cluster.api.list(path)[0]]
    close = difflib.get_close_matches(name, there, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"'{program()} list -A' shows all there are"
    return f'no {" or ".join(paths)} "{name}" in namespace {cluster.namespace}; {hint}'
