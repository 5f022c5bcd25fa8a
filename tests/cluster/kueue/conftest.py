"""A cluster with the real Kueue on it, and operators that serve one namespace of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.control_plane import ControlPlane, Settings
from cluster.kueue import Kueue
from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import serve_crd
from fixtures import skip_unless_ci
from services.binaries import ToolMissingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster.scenarios.forked_operator import ForkServerClient

RACKS = {"rack-1": "spot", "rack-2": "reserved"}
NODES_PER_RACK = 2
PROFILES = {"one-rack": {"annotations": {"kueue.x-k8s.io/podset-required-topology": "test.qlora.dev/rack"}}}


@pytest.fixture(scope="session")
def kueue_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Two racks of two fake nodes with 8 GPUs each, one of pool ``spot`` and one of pool ``reserved``."""
    try:
        cluster = ControlPlane(tmp_path_factory.mktemp("kueue-cluster"), Settings(eviction_seconds=1))
        with cluster:
            cluster.add_kueue()
            for rack, pool in RACKS.items():
                labels = {"test.qlora.dev/rack": rack, "pool": pool}
                cluster.add_kwok_nodes(NODES_PER_RACK, labels=labels, prefix=rack)
            serve_crd(cluster)
            yield cluster
    except ToolMissingError as error:
        skip_unless_ci(str(error))


@pytest.fixture(scope="session")
def kueue(kueue_cluster: ControlPlane) -> Kueue:
    return kueue_cluster.add_kueue()


@pytest.fixture
def team(kueue_cluster: ControlPlane) -> Iterator[str]:
    """An empty namespace."""
    name = kueue_cluster.create_namespace("team")
    yield name
    kueue_cluster.delete_namespace(name)


@pytest.fixture
def operator(
    fork_server: ForkServerClient, kueue_cluster: ControlPlane, team: str, tmp_path: Path
) -> Iterator[ForkedOperator]:
    """A running operator that serves the team's namespace."""
    settings = {"namespaces": [team], "profiles": PROFILES}
    with ForkedOperator(fork_server, tmp_path / "operator", kueue_cluster.kubeconfig, **settings) as running:
        yield running
