"""The Python client, as in a notebook."""

from __future__ import annotations

import hashlib
import json

import pytest

from cluster.scenarios.jobs import qlora_job
from cluster.scenarios.script import pods_do
from qlora import QLoRAClient, QLoRAError


@pytest.fixture
def client(crd_cluster, served_namespace, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with QLoRAClient(served_namespace, kubeconfig=crd_cluster.kubeconfig) as client:
        yield client


def test_from_submit_to_the_adapter(client, api, tmp_path):
    adapter = b"{}"
    published = tmp_path / "published" / "x-attempt-1" / "adapter"
    published.mkdir(parents=True)
    files = []
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (published / name).write_bytes(adapter)
        path, sha256 = f"x-attempt-1/adapter/{name}", hashlib.sha256(adapter).hexdigest()
        files.append({"path": path, "size": len(adapter), "sha256": sha256})
    manifest = json.dumps(
        {"schema": "qlora.dev/manifest/v1", "adapter": "x-attempt-1/adapter", "files": files}
    ).encode()
    (tmp_path / "published" / "manifest.json").write_bytes(manifest)
    where = {
        "uri": str(published),
        "manifestUri": str(tmp_path / "published" / "manifest.json"),
        "manifestSha256": hashlib.sha256(manifest).hexdigest(),
    }
    progress = {"step": 10, "totalSteps": 10, "loss": "1.5", "tokensPerSecond": "1000"}
    word = {"exitCode": 0, "reason": "Completed", "message": "step 10 of 10", "progress": progress, "adapter": where}
    does = {"run-seconds": "1", "exit-code": 0, "termination-message": json.dumps(word)}
    with pods_do(api, client.namespace, does, job="noted"):
        body = qlora_job("noted")
        del body["metadata"]["namespace"]
        job = client.submit(body, {"lora.rank": 32})
        assert (job.name, job.state) == ("noted", "Pending")
        states = [step.state for step in client.follow("noted")]
    assert states[-1] == "Succeeded"
    assert client.get("noted").adapter["uri"] == where["uri"]
    assert "noted" in [job.name for job in client.list()]
    folder = client.adapter("noted", tmp_path / "here")
    assert (folder / "adapter_config.json").read_bytes() == adapter
    frame = client.metrics(["noted"])
    row = frame.loc["noted"] if hasattr(frame, "loc") else frame["noted"]
    assert (row["loss"], row["tokensPerSecond"], row["step"]) == (1.5, 1000.0, 10)


def test_an_error_is_an_error_in_words(client):
    with pytest.raises(QLoRAError, match='no job "nobody" in namespace'):
        client.get("nobody")
    body = qlora_job("local")
    body["spec"]["model"]["source"] = "/models/base"
    with pytest.raises(ValueError, match=r"spec.model.source: .* is a path on this machine"):
        client.submit(body)
    assert client.submit(qlora_job("dry", client.namespace), dry_run=True).name == "dry"


def test_without_pandas_figures_are_plain(client, monkeypatch):
    client.submit(qlora_job("plain", client.namespace, suspend=True))
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    assert client.metrics(["plain"])["plain"]["restarts"] == 0
