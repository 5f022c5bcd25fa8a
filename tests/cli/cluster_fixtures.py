"""Fixtures of tests of commands for clusters: golden files, and no cluster of the machine's own."""

import os
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
REFRESH = os.environ.get("REFRESH_GOLDEN") == "1"


@pytest.fixture
def golden():
    """Compare a text with a file; REFRESH_GOLDEN=1 writes it instead, which CI refuses."""

    def compare(name, text):
        path = GOLDEN / name
        if REFRESH:
            assert os.environ.get("CI", "").lower() != "true", "golden files are not written in CI"
            path.write_text(text)
        assert text == path.read_text()

    return compare


@pytest.fixture(autouse=True)
def _no_cluster_of_the_machines_own(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
