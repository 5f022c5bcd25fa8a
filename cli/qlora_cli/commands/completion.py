"""Completion of names, and of the whole command line for kubectl, which asks ``kubectl_complete-qlora``."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from qlora_cli.kube.target import Target

SECONDS = 2.0
"""A person waits for completion; a cluster that takes longer has no names."""


def job_names(incomplete: str) -> list[str]:
    """Names of jobs in the context's namespace."""
    from qlora_cli.kube.names import jobs_path

    return _names(jobs_path, incomplete)


def sweep_names(incomplete: str) -> list[str]:
    """Names of sweeps in the context's namespace."""
    from qlora_cli.kube.names import sweeps_path

    return _names(sweeps_path, incomplete)


def namespaces(incomplete: str) -> list[str]:
    return _names(lambda _: "/api/v1/namespaces", incomplete)


def _names(path: Callable[[str], str], incomplete: str) -> list[str]:
    """Nothing where anything goes wrong: a completion that prints an error ruins the line."""
    from qlora_cli.kube.target import connect

    try:
        with connect(_target(_words())) as cluster:
            items = cluster.api.get(path(cluster.namespace), limit=500)["items"]
    except Exception:  # noqa: BLE001
        return []
    return [name for item in items if (name := item["metadata"]["name"]).startswith(incomplete)]


def _words() -> list[str]:
    """Return the line so far, as the shell's script hands it over: bash in the one variable, others in the other."""
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()


def _target(words: list[str]) -> Target:
    """Namespace and context as far as they are on the line already."""
    from pathlib import Path

    from qlora_cli.kube.target import Target

    given: dict[str, str] = {}
    for word, following in pairwise(words):
        for names in (("-n", "--namespace"), ("--context",), ("--kubeconfig",)):
            if word in names:
                given[names[-1]] = following
    kubeconfig = given.get("--kubeconfig")
    return Target(Path(kubeconfig) if kubeconfig else None, given.get("--context"), given.get("--namespace"))
