"""One cluster for all end-to-end tests of a worker: it takes half a minute to set up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.control_plane import Settings
from demo.installed_cluster import InstalledCluster
from demo.material import make_material
from fixtures import skip_unless_ci
from services.binaries import ToolMissingError

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "work"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InstalledCluster]:
    """A real node, the operator installed by its chart, and a bucket with a base and rows."""
    try:
        made = InstalledCluster(tmp_path_factory.mktemp("e2e"), Settings(real_nodes=True, node_grace_seconds=8))
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    with made:
        made.s3.bucket(BUCKET)
        make_material(made.s3.folder_of(BUCKET))
        made.install(trainer={"nodeLostSeconds": 2})
        yield made


@pytest.fixture
def bucket() -> str:
    return f"s3://{BUCKET}"


@pytest.fixture
def team(installed: InstalledCluster) -> Iterator[str]:
    """A tenant's namespace, which enforces the restricted profile. Its pods are gone before the next test."""
    name = installed.tenant()
    yield name
    installed.cluster.delete_namespace(name)
