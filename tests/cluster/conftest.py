"""Real clusters as fixtures: one of each kind for each pytest worker, and a namespace for each test.

A test that stops, restarts or fills a cluster makes its own with ``ControlPlane(tmp_path)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.control_plane import ControlPlane, Settings
from cluster.scenarios.forked_operator import ForkServerClient
from cluster.scenarios.jobs import serve_crd
from fixtures import skip_unless_ci
from services.binaries import ToolMissingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.api import ClusterApi


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane without nodes: objects are checked, stored and controlled, and no pod is ever placed."""
    try:
        cluster = ControlPlane(tmp_path_factory.mktemp("control-plane"))
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    with cluster:
        yield cluster


@pytest.fixture(scope="session")
def kwok_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A cluster with four fake nodes of 8 GPUs each, on which pods do what their annotations say.

    A node that is lost keeps its pods for a second, not for five minutes.
    """
    try:
        cluster = ControlPlane(tmp_path_factory.mktemp("kwok-cluster"), Settings(eviction_seconds=1))
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    with cluster:
        cluster.add_kwok_nodes(4)
        yield cluster


@pytest.fixture(scope="session")
def crd_cluster(kwok_cluster: ControlPlane) -> ControlPlane:
    """The kwok cluster with the CustomResourceDefinition served."""
    serve_crd(kwok_cluster)
    return kwok_cluster


@pytest.fixture
def api(crd_cluster: ControlPlane) -> ClusterApi:
    """Return the client of the kwok cluster, which serves QLoRAJobs."""
    return crd_cluster.api


@pytest.fixture
def kwok_namespace(kwok_cluster: ControlPlane) -> Iterator[str]:
    """Name of an empty namespace of the kwok cluster's. Its pods are gone before the next test, which has all nodes."""
    name = kwok_cluster.create_namespace()
    yield name
    kwok_cluster.delete_namespace(name)


@pytest.fixture
def namespace(control_plane: ControlPlane) -> str:
    """Name of an empty namespace of the control plane's."""
    return control_plane.create_namespace()


@pytest.fixture(scope="session")
def node_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A cluster with one real node that says it has 8 GPUs; pods run as containers, on the CPU."""
    try:
        cluster = ControlPlane(tmp_path_factory.mktemp("node-cluster"), Settings(real_nodes=True))
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    with cluster:
        cluster.add_node(gpus=8)
        yield cluster


@pytest.fixture
def node_namespace(node_cluster: ControlPlane) -> Iterator[str]:
    """Name of an empty namespace of the cluster with a real node. Its pods are gone before the next test."""
    name = node_cluster.create_namespace()
    yield name
    node_cluster.delete_namespace(name)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServerClient]:
    """For operators that start in no time."""
    with ForkServerClient(tmp_path_factory.mktemp("fork_server")) as running:
        yield running
