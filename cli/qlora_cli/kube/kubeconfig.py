"""Kubeconfig files as kubectl reads them: several are merged, the first to say something wins.

https://kubernetes.io/docs/concepts/configuration/organize-cluster-access-kubeconfig/

What is not here: the ``auth-provider`` stanzas that kubectl itself gave up in 1.26.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.kube.errors import ConfigError
from qlora_storage.local_paths import expand_home

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Folder in which a pod finds the credentials of its service account."""

Section = dict[str, Any]


@dataclass(frozen=True)
class Exec:
    """A command that answers with credentials."""

    command: str
    args: tuple[str, ...]
    env: dict[str, str]
    api_version: str
    interactive: str
    """Never, IfAvailable or Always."""
    wants_cluster: bool
    install_hint: str


@dataclass(frozen=True)
class User:
    """Credentials of a user.

    At most one of token, exec and basic is used, in kubectl's order; a certificate may be added to any.
    """

    token: str = field(default="", repr=False)
    token_file: Path | None = None
    name: str = ""
    password: str = field(default="", repr=False)
    certificate: bytes | Path | None = field(default=None, repr=False)
    key: bytes | Path | None = field(default=None, repr=False)
    exec: Exec | None = None
    impersonate: tuple[tuple[str, str], ...] = ()
    """Headers."""


@dataclass(frozen=True)
class Access:
    """One way to one cluster."""

    context: str
    """Empty in a pod."""
    server: str
    namespace: str
    user: User
    authority: bytes | Path | None = None
    insecure: bool = False
    tls_server_name: str = ""
    proxy: str = ""
    cluster: Section = field(default_factory=dict, repr=False)
    """As it stands in the file, for exec plugins that want it."""


def load(kubeconfig: Path | None = None, context: str | None = None) -> Access:
    """Return the way to the cluster that kubectl would take; in a pod without a kubeconfig, its own service account's.

    Raises:
        ConfigError: there is none, or it cannot be understood.

    """
    files = [kubeconfig] if kubeconfig else default_files()
    found = [path for path in files if path.is_file()]
    if kubeconfig and not found:
        raise ConfigError(f"--kubeconfig {kubeconfig}: there is no such file")
    if not found:
        if inside := in_pod():
            return inside
        names = ", ".join(str(path) for path in files)
        raise ConfigError(f"no cluster is configured: {names} is not there; name one with --kubeconfig or $KUBECONFIG")
    return _access(_merged(found), context, ", ".join(str(path) for path in found))


def is_configured() -> bool:
    """Return whether there is any way to a cluster."""
    return any(path.is_file() for path in default_files()) or in_pod() is not None


def default_files() -> list[Path]:
    named = [Path(part) for part in os.environ.get("KUBECONFIG", "").split(os.pathsep) if part]
    return named or [Path.home() / ".kube" / "config"]


def in_pod() -> Access | None:
    """Return a pod's own way to its cluster."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    token = ACCOUNT / "token"
    if not (host and port and token.is_file()):
        return None
    namespace = ACCOUNT / "namespace"
    return Access(
        context="",
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        namespace=namespace.read_text().strip() if namespace.is_file() else "default",
        user=User(token_file=token),
        authority=ACCOUNT / "ca.crt",
    )


def contexts() -> list[str]:
    """Names of all contexts, for completion; none where the files cannot be read."""
    try:
        return list(_merged([path for path in default_files() if path.is_file()])["contexts"])
    except ConfigError:
        return []


# -------------------------------------------------------------------------------------------------------------- reading


def _merged(files: list[Path]) -> dict[str, Any]:
    """Named sections of all files, and the first current-context."""
    merged: dict[str, Any] = {"current": "", "clusters": {}, "users": {}, "contexts": {}}
    for path in files:
        config = _parsed(path)
        merged["current"] = merged["current"] or config.get("current-context") or ""
        for kind, inner in (("clusters", "cluster"), ("users", "user"), ("contexts", "context")):
            for entry in config.get(kind) or ():
                merged[kind].setdefault(entry.get("name", ""), (path.parent, entry.get(inner) or {}))
    return merged


def _parsed(path: Path) -> Section:
    import json  # noqa: PLC0415 with yaml only where it is needed

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        config = json.loads(text)
    except ValueError:
        import yaml  # noqa: PLC0415

        try:
            config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 a safe loader
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: YAML syntax error: {' '.join(str(error).split())}") from None
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: is no kubeconfig")
    return config


def _access(merged: dict[str, Any], wanted: str | None, source: str) -> Access:
    name = wanted or merged["current"]
    if not name:
        raise ConfigError(f"{source}: has no current-context; name one with --context: {_known(merged['contexts'])}")
    _, context = _named(merged, "contexts", name, "--context" if wanted else "current-context", source)
    folder, cluster = _named(merged, "clusters", context.get("cluster", ""), f"context {name}", source)
    user_folder, user = folder, Section()
    if context.get("user"):
        user_folder, user = _named(merged, "users", context["user"], f"context {name}", source)
    if not cluster.get("server"):
        raise ConfigError(f"{source}: cluster {context.get('cluster')} names no server")
    return Access(
        context=name,
        server=cluster["server"].rstrip("/"),
        namespace=context.get("namespace") or "default",
        user=_user(user, user_folder, f"{source}: user {context.get('user')}"),
        authority=_data_or_file(cluster, "certificate-authority", folder, source),
        insecure=bool(cluster.get("insecure-skip-tls-verify")),
        tls_server_name=cluster.get("tls-server-name", ""),
        proxy=cluster.get("proxy-url", ""),
        cluster=cluster,
    )


def _named(merged: dict[str, Any], kind: str, name: str, who: str, source: str) -> tuple[Path, Section]:
    found: tuple[Path, Section] | None = merged[kind].get(name)
    if found is None:
        raise ConfigError(f'{source}: {who} names "{name}", which is not in {kind}; there are {_known(merged[kind])}')
    return found


def _known(names: dict[str, Any]) -> str:
    return ", ".join(sorted(names)) or "none"


def _user(user: Section, folder: Path, where: str) -> User:
    if user.get("auth-provider") and not user.get("token"):
        raise ConfigError(f"{where}: auth-provider is no longer known to Kubernetes; use its exec plugin instead")
    headers = [("Impersonate-User", user["as"])] if user.get("as") else []
    headers += [("Impersonate-Group", group) for group in user.get("as-groups") or ()]
    headers += [("Impersonate-Uid", user["as-uid"])] if user.get("as-uid") else []
    return User(
        token=user.get("token", ""),
        token_file=_path(user.get("tokenFile"), folder),
        name=user.get("username", ""),
        password=user.get("password", ""),
        certificate=_data_or_file(user, "client-certificate", folder, where),
        key=_data_or_file(user, "client-key", folder, where),
        exec=_exec(user["exec"], folder, where) if user.get("exec") else None,
        impersonate=tuple(headers),
    )


def _exec(given: Section, folder: Path, where: str) -> Exec:
    command = given.get("command", "")
    if not command:
        raise ConfigError(f"{where}: exec names no command")
    if os.sep in command:  # relative to the file; a bare name is looked for on PATH
        command = str(folder / command)
    return Exec(
        command=command,
        args=tuple(given.get("args") or ()),
        env={entry["name"]: entry["value"] for entry in given.get("env") or ()},
        api_version=given.get("apiVersion", "client.authentication.k8s.io/v1"),
        interactive=given.get("interactiveMode") or "IfAvailable",
        wants_cluster=bool(given.get("provideClusterInfo")),
        install_hint=" ".join((given.get("installHint") or "").split()),
    )


def _data_or_file(section: Section, name: str, folder: Path, where: str) -> bytes | Path | None:
    import base64  # noqa: PLC0415

    if data := section.get(f"{name}-data"):
        try:
            return base64.b64decode(data, validate=False)
        except ValueError:
            raise ConfigError(f"{where}: {name}-data is not base64") from None
    return _path(section.get(name), folder)


def _path(given: str | None, folder: Path) -> Path | None:
    return folder / expand_home(given) if given else None
