"""The operator on a cluster of fake nodes, with the namespace of the test alone in its care."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.history import History
from cluster.scenarios.operator import OperatorProcess
from cluster.scenarios.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster.control_plane import ControlPlane
    from cluster.scenarios.forked_operator import ForkServerClient


@pytest.fixture(scope="session")
def history(crd_cluster: ControlPlane) -> Iterator[History]:
    """Return the history of all that happened on the cluster since."""
    with History(crd_cluster) as running:
        yield running


@pytest.fixture
def proxy(crd_cluster: ControlPlane, tmp_path: Path) -> Iterator[Proxy]:
    """Stands before the API server."""
    with Proxy(crd_cluster, tmp_path / "proxy") as running:
        yield running


@pytest.fixture
def forked(
    fork_server: ForkServerClient, crd_cluster: ControlPlane, kwok_namespace: str, tmp_path: Path
) -> Iterator[ForkedOperator]:
    """A running operator that serves the test's namespace."""
    with ForkedOperator(
        fork_server, tmp_path / "operator", crd_cluster.kubeconfig, namespaces=[kwok_namespace]
    ) as running:
        yield running


@pytest.fixture
def behind_proxy(
    fork_server: ForkServerClient, proxy: Proxy, kwok_namespace: str, tmp_path: Path
) -> Iterator[ForkedOperator]:
    """A running operator that serves the test's namespace and reaches the API server through ``proxy``."""
    with ForkedOperator(fork_server, tmp_path / "operator", proxy.kubeconfig, namespaces=[kwok_namespace]) as running:
        yield running


@pytest.fixture
def operator(crd_cluster: ControlPlane, kwok_namespace: str, tmp_path: Path) -> Iterator[OperatorProcess]:
    """A running operator that serves the test's namespace."""
    with OperatorProcess(tmp_path / "operator", crd_cluster.kubeconfig, namespaces=[kwok_namespace]) as running:
        yield running
