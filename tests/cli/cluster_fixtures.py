"""Fixtures of tests of commands for clusters: golden files, and no cluster of the machine's own."""

from pathlib import Path

import pytest

from fixtures import check_golden

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden():
    """Compare a text with a golden file by its name."""
    return lambda name, text: check_golden(GOLDEN / name, text)


@pytest.fixture(autouse=True)
def _no_cluster_of_the_machines_own(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
