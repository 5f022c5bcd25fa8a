"""The operator on a cluster of fake nodes, with the namespace of the test alone in its care."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.harness.jobs import GROUP
from cluster.harness.operator import Operator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.harness.control_plane import ControlPlane

CRD = Path(__file__).parents[3] / "crds" / "qlora.dev_qlorajobs.yaml"


@pytest.fixture(scope="session")
def crd_cluster(kwok_cluster: ControlPlane) -> ControlPlane:
    """The kwok cluster with the CustomResourceDefinition served."""
    kwok_cluster.kubectl("apply", "-f", CRD)
    kwok_cluster.kubectl("wait", "--for=condition=Established", "crd/qlorajobs.qlora.dev")
    kwok_cluster.api.wait_for(f"{GROUP}/qlorajobs", bool, what="QLoRAJobs are served")  # a moment after "Established"
    return kwok_cluster


@pytest.fixture
def operator(crd_cluster: ControlPlane, kwok_namespace: str, tmp_path: Path) -> Iterator[Operator]:
    """A running operator that serves the test's namespace."""
    with Operator(tmp_path / "operator", crd_cluster.kubeconfig, namespaces=[kwok_namespace]) as running:
        yield running
