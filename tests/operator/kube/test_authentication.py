"""Credentials of the operator: read as kubectl would, and again as it ages."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys

import pytest
from aiohttp import web

from qlora_operator.kube import authentication
from qlora_operator.kube.authentication import cluster_identity, load_credentials
from qlora_operator.kube.client import Api
from qlora_operator.kube.kopf_import import kopf


@pytest.fixture
def kubeconfig(tmp_path, monkeypatch):
    """Writes a kubeconfig with this user, for this server."""
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))

    def write(user, server="https://127.0.0.1:6443", **cluster):
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "one", "user": "me"}}],
            "clusters": [{"name": "one", "cluster": {"server": server, **cluster}}],
            "users": [{"name": "me", "user": user}],
        }
        path.write_text(json.dumps(config))

    return write


def test_a_token_of_the_kubeconfig_is_sent(kubeconfig):
    kubeconfig({"token": "of-the-file"})
    found = load_credentials()
    assert (found.server, found.as_http_headers()) == (
        "https://127.0.0.1:6443",
        {"Authorization": "Bearer of-the-file"},
    )


def test_a_kubeconfig_that_asks_a_program_is_read_by_the_official_client(kubeconfig, tmp_path):
    plugin = tmp_path / "plugin"
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "fresh"}}
    plugin.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    plugin.chmod(0o755)
    asked = {"apiVersion": answer["apiVersion"], "command": str(plugin), "interactiveMode": "Never"}
    kubeconfig({"exec": asked})
    script = "from qlora_operator.kube.authentication import load_credentials as load; print(load().as_http_headers())"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.stdout == "{'Authorization': 'Bearer fresh'}\n", ran.stderr


def test_a_kubeconfig_counts_before_the_account_of_the_pod_it_runs_in(kubeconfig, monkeypatch):
    account = kopf.ConnectionInfo(server="https://10.0.0.1", token="the-pods")
    monkeypatch.setattr(kopf, "login_with_service_account", lambda **_: account)
    kubeconfig({"token": "of-the-file"})
    assert load_credentials().token == "of-the-file"
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    assert (load_credentials().server, load_credentials().token) == ("https://[fd00::1]:443", "the-pods")


def test_a_file_named_in_a_kubeconfig_lies_beside_it(kubeconfig, tmp_path):
    (tmp_path / "ca.crt").write_text("a certificate")
    kubeconfig({"token": "t"}, **{"certificate-authority": "ca.crt"})
    script = "from qlora_operator.kube.authentication import load_credentials as load; print(load().ca_path)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.stdout == f"{tmp_path / 'ca.crt'}\n", ran.stderr


PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


def test_a_cluster_is_known_by_the_certificate_of_its_ca_however_that_is_given(kubeconfig, tmp_path):
    kubeconfig({"token": "t"}, **{"certificate-authority-data": base64.b64encode(PEM.encode()).decode()})
    inline = cluster_identity(load_credentials())
    (tmp_path / "ca.crt").write_text(PEM.rstrip())
    in_file = cluster_identity(kopf.ConnectionInfo(server="https://10.0.0.1", ca_path=str(tmp_path / "ca.crt")))
    assert inline == in_file
    assert len(inline) == 32
    other = kopf.ConnectionInfo(server="https://10.0.0.1", ca_data=PEM.replace("MIIB", "MIIC"))
    assert cluster_identity(other) != inline


def test_a_cluster_without_a_certificate_that_can_be_read_is_not_known(tmp_path, caplog):
    assert cluster_identity(kopf.ConnectionInfo(server="http://10.0.0.1")) == ""
    assert cluster_identity(kopf.ConnectionInfo(server="http://10.0.0.1", ca_path=str(tmp_path / "none"))) == ""
    assert "the CA certificate of the API server cannot be read" in caplog.text


def test_what_no_reader_heeds_is_refused_with_a_way_out(kubeconfig):
    kubeconfig({"token": "t"}, **{"tls-server-name": "inside"})
    with pytest.raises(kopf.LoginError, match="tls-server-name is not supported: use kubectl proxy"):
        load_credentials()


def test_without_any_configuration_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(kopf.LoginError):
        load_credentials()


def test_a_renewed_token_is_sent_once_the_old_one_has_aged(kubeconfig, monkeypatch, tmp_path):
    sent = []

    async def answer(request):
        sent.append(request.headers["Authorization"])
        return web.json_response({})

    async def ask():
        app = web.Application()
        app.router.add_get("/api", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server = f"http://127.0.0.1:{runner.addresses[0][1]}"
        kubeconfig({"token": "first"}, server)
        api = Api(load_credentials(), lambda *_: None)
        try:
            await api.get("/api")
            kubeconfig({"token": "second"}, server)
            await api.get("/api")
            monkeypatch.setattr(authentication, "RENEW_SECONDS", 0)
            await api.get("/api")
            (tmp_path / "kubeconfig").unlink()  # what cannot be read again is used as it was
            await api.get("/api")
        finally:
            await api.close()
            await runner.cleanup()

    asyncio.run(ask())
    assert sent == ["Bearer first", "Bearer first", "Bearer second", "Bearer second"]


def test_the_operator_starts_without_the_official_client():
    script = "import sys, qlora_operator.__main__; print('kubernetes' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
