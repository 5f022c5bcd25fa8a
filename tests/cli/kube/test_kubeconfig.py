"""The way to a cluster, as kubectl would find it."""

import base64
import json
import sys
from pathlib import Path

import pytest
import yaml

from qlora_cli.kube import authentication, kubeconfig
from qlora_cli.kube.errors import ConfigError


def config(name="prod", **user):
    return {
        "clusters": [{"name": name, "cluster": {"server": f"https://{name}.example:6443/"}}],
        "users": [{"name": "me", "user": user or {"token": "t"}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": "me", "namespace": f"{name}-ns"}}],
        "current-context": name,
    }


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write kubeconfig files and name them in $KUBECONFIG."""

    def files(*bodies):
        paths = []
        for number, body in enumerate(bodies):
            path = tmp_path / f"config-{number}"
            path.write_text(body if isinstance(body, str) else yaml.safe_dump(body))
            paths.append(path)
        monkeypatch.setenv("KUBECONFIG", ":".join(map(str, paths)))
        return paths

    return files


def test_the_current_context_with_its_namespace(write):
    write(config())
    access = kubeconfig.load()
    assert (access.context, access.server, access.namespace) == ("prod", "https://prod.example:6443", "prod-ns")
    assert access.user.token == "t"


def test_of_several_files_the_first_to_say_something_wins(write):
    second = config("dev", token="second")
    write(config("prod", token="first"), second)
    assert kubeconfig.load().context == "prod"
    dev = kubeconfig.load(context="dev")
    assert dev.server == "https://dev.example:6443"
    assert dev.user.token == "first"  # the user "me" of the first file
    assert kubeconfig.contexts() == ["prod", "dev"]


def test_a_flag_names_the_only_file(write, tmp_path):
    write(config())
    other = tmp_path / "other"
    other.write_text(json.dumps(config("other")))
    assert kubeconfig.load(other).context == "other"


def test_paths_count_from_the_file_they_stand_in(write, tmp_path):
    body = config(**{"client-certificate": "me.crt", "client-key": "/keys/me.key", "tokenFile": "token"})
    body["clusters"][0]["cluster"]["certificate-authority"] = "ca.crt"
    write(body)
    access = kubeconfig.load()
    assert access.authority == tmp_path / "ca.crt"
    assert access.user.certificate == tmp_path / "me.crt"
    assert access.user.key == Path("/keys/me.key")
    assert access.user.token_file == tmp_path / "token"


def test_data_stands_in_for_files(write):
    encoded = base64.b64encode(b"pem").decode()
    write(config(**{"client-certificate-data": encoded, "client-key-data": encoded}))
    assert kubeconfig.load().user.certificate == b"pem"


def test_impersonation_proxy_and_server_name(write):
    body = config(**{"token": "t", "as": "jane", "as-groups": ["a", "b"]})
    body["clusters"][0]["cluster"] |= {"proxy-url": "http://proxy:8080", "tls-server-name": "k8s"}
    write(body)
    access = kubeconfig.load()
    assert access.user.impersonate == (
        ("Impersonate-User", "jane"),
        ("Impersonate-Group", "a"),
        ("Impersonate-Group", "b"),
    )
    assert (access.proxy, access.tls_server_name) == ("http://proxy:8080", "k8s")


def test_a_pod_without_a_kubeconfig_uses_its_service_account(monkeypatch, tmp_path):
    monkeypatch.setattr(kubeconfig, "ACCOUNT", tmp_path)
    (tmp_path / "token").write_text("t")
    (tmp_path / "namespace").write_text("research")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    access = kubeconfig.load()
    assert (access.server, access.namespace, access.context) == ("https://10.0.0.1:443", "research", "")


@pytest.mark.parametrize(
    ("bodies", "context", "message"),
    [
        ([], None, "no cluster is configured: .* name one with --kubeconfig"),
        ([config()], "dev", '--context names "dev", which is not in contexts; there are prod'),
        ([{**config(), "current-context": ""}], None, "has no current-context; name one with --context: prod"),
        ([{**config(), "clusters": []}], None, 'context prod names "prod", which is not in clusters; there are none'),
        ([{**config(), "users": []}], None, 'context prod names "me", which is not in users'),
        (["a: [b"], None, "YAML syntax error"),
        (["- a"], None, "is no kubeconfig"),
        ([config(**{"auth-provider": {"name": "gcp"}})], None, "auth-provider is no longer known to Kubernetes"),
        ([config(exec={"args": []})], None, "exec names no command"),
    ],
)
def test_what_is_wrong_is_named(write, bodies, context, message):
    if bodies:
        write(*bodies)
    with pytest.raises(ConfigError, match=message):
        kubeconfig.load(context=context)


# ------------------------------------------------------------------------------------------------------- exec plugins

PLUGIN = """\
import json, os, sys
info = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
with open(sys.argv[1], "a") as calls:
    calls.write(json.dumps(info) + "\\n")
token = f"token-{sum(1 for _ in open(sys.argv[1]))}-{os.environ['FLAVOUR']}"
status = {"token": token, "expirationTimestamp": os.environ.get("EXPIRES") or None}
print(json.dumps({"apiVersion": info["apiVersion"], "kind": "ExecCredential", "status": status}))
"""


@pytest.fixture
def plugin(write, tmp_path):
    """A kubeconfig with an exec plugin; the file in which it notes its calls."""
    script, calls = tmp_path / "plugin.py", tmp_path / "calls"
    script.write_text(PLUGIN)
    body = config(
        exec={
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": [str(script), str(calls)],
            "env": [{"name": "FLAVOUR", "value": "sweet"}],
            "provideClusterInfo": True,
            "interactiveMode": "Never",
        }
    )
    write(body)
    return calls


def test_a_plugin_is_told_of_the_cluster_and_gives_a_token(plugin):
    access = kubeconfig.load()
    identity = authentication.Identity(access)
    assert identity.credential.token == "token-1-sweet"
    spec = json.loads(plugin.read_text())["spec"]
    assert spec == {"interactive": False, "cluster": {"server": "https://prod.example:6443/"}}


def test_a_token_about_to_expire_is_renewed_before_it_is_used(plugin, monkeypatch):
    import httpx

    monkeypatch.setenv("EXPIRES", "2020-01-01T00:00:00Z")
    identity = authentication.Identity(kubeconfig.load())
    request = next(identity.auth_flow(httpx.Request("GET", "https://x")))
    assert request.headers["Authorization"] == "Bearer token-2-sweet"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": "no-such-plugin", "installHint": "brew install it"}, "no-such-plugin .* is not installed; brew"),
        ({"args": ["-c", "raise SystemExit(3)"]}, "ended with code 3"),
        ({"args": ["-c", "print(1)"]}, "its answer is no ExecCredential"),
    ],
)
def test_a_plugin_that_fails_is_named(plugin, write, change, message):
    path = Path(str(plugin)).with_name("config-0")
    body = yaml.safe_load(path.read_text())
    body["users"][0]["user"]["exec"] |= change
    write(body)
    with pytest.raises(ConfigError, match=message):
        authentication.Identity(kubeconfig.load())
