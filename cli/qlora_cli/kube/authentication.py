"""From a kubeconfig's words to a client that the API server knows: exec plugins, tokens, certificates."""

from __future__ import annotations

import base64
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from qlora_cli.kube.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator

    from qlora_cli.kube.kubeconfig import Access, Exec

EXEC_SECONDS = 300
"""A plugin may wait for a person in a browser."""
TOKEN_FILE_SECONDS = 60
"""A pod's token is renewed under the same name long before it expires."""
EARLY_SECONDS = 30
"""A token is renewed this long before it expires."""


@dataclass(frozen=True)
class Credential:
    """Credentials from an exec plugin."""

    token: str = ""
    certificate: str = ""
    key: str = ""
    expires: float | None = None
    """Seconds since the epoch."""


def run_plugin(plugin: Exec, access: Access) -> Credential:
    """Ask an exec plugin.

    Raises:
        ConfigError: it is not there, fails, or answers what is no credential.

    """
    if shutil.which(plugin.command) is None:
        hint = f"; {plugin.install_hint}" if plugin.install_hint else ""
        raise ConfigError(f"exec plugin {plugin.command} of context {access.context} is not installed{hint}")
    interactive = plugin.interactive != "Never" and sys.stdin.isatty()
    spec: dict[str, Any] = {"interactive": interactive}
    if plugin.wants_cluster:
        spec["cluster"] = {k: v for k, v in access.cluster.items() if k != "extensions"}
    info = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": spec}
    environment = {**os.environ, **plugin.env, "KUBERNETES_EXEC_INFO": json.dumps(info)}
    try:
        done = subprocess.run(
            [plugin.command, *plugin.args],
            env=environment,
            stdin=None if interactive else subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # standard error is the plugin's way to the person
            timeout=EXEC_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"exec plugin {plugin.command} of context {access.context}: {error}") from None
    if done.returncode:
        raise ConfigError(f"exec plugin {plugin.command} of context {access.context} ended with code {done.returncode}")
    return _credential(done.stdout, plugin)


def _credential(answer: bytes, plugin: Exec) -> Credential:
    try:
        status = json.loads(answer)["status"]
        expires = status.get("expirationTimestamp")
        return Credential(
            token=status.get("token", ""),
            certificate=status.get("clientCertificateData", ""),
            key=status.get("clientKeyData", ""),
            expires=datetime.fromisoformat(expires).timestamp() if expires else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"exec plugin {plugin.command}: its answer is no ExecCredential with a status") from None


class Identity(httpx.Auth):
    """Adds who asks to each request; asks the plugin again when its token is about to expire or was refused."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._user = access.user
        self._read_at = 0.0
        self._file_token = ""
        plugin = self._user.exec
        self.credential = run_plugin(plugin, access) if plugin and not self._has_token else Credential()

    @property
    def _has_token(self) -> bool:
        return bool(self._user.token or self._user.token_file)

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """As httpx wants it."""
        for name, value in self._user.impersonate:
            request.headers.setdefault(name, value)
        self._sign(request)
        answer = yield request
        if answer.status_code == httpx.codes.UNAUTHORIZED and self._renewed():
            self._sign(request)
            yield request

    def _sign(self, request: httpx.Request) -> None:
        token = self._token()
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        elif self._user.name:
            pair = base64.b64encode(f"{self._user.name}:{self._user.password}".encode()).decode()
            request.headers["Authorization"] = f"Basic {pair}"

    def _token(self) -> str:
        if self._user.token_file:
            if time.monotonic() - self._read_at > TOKEN_FILE_SECONDS or not self._file_token:
                with suppress(OSError):
                    self._file_token = self._user.token_file.read_text().strip()
                self._read_at = time.monotonic()
            return self._file_token or self._user.token
        if self._user.token:
            return self._user.token
        expires = self.credential.expires
        if expires is not None and expires - EARLY_SECONDS < time.time():
            self._renewed()
        return self.credential.token

    def _renewed(self) -> bool:
        """Ask anew; False where there is nobody to ask."""
        self._read_at = 0.0
        if self._user.exec is None or self._has_token:
            return self._user.token_file is not None
        self.credential = run_plugin(self._user.exec, self._access)
        return bool(self.credential.token)


def tls(access: Access, credential: Credential) -> ssl.SSLContext | bool:
    """Whom to trust, and the client's own certificate.

    Raises:
        ConfigError: a certificate or key cannot be used.

    """
    if not access.server.startswith("https://"):
        return False
    try:
        context = ssl.create_default_context()
        if access.authority is not None:  # the cluster's own authority alone
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            _trust(context, access.authority)
        if access.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        certificate, key = access.user.certificate or credential.certificate, access.user.key or credential.key
        if certificate:
            _present(context, certificate, key or certificate)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigError(f"context {access.context}: certificates cannot be used: {error}") from None
    return context


def _trust(context: ssl.SSLContext, authority: bytes | Path) -> None:
    if isinstance(authority, Path):
        context.load_verify_locations(cafile=authority)
    else:
        context.load_verify_locations(cadata=authority.decode("ascii", errors="replace"))
    # As Go has it: authorities without the key usage extension are authorities too.
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)


def _present(context: ssl.SSLContext, certificate: bytes | str | Path, key: bytes | str | Path) -> None:
    """Load a client certificate. OpenSSL takes files only: what is data is one for a moment, for this user alone."""
    if isinstance(certificate, Path) and isinstance(key, Path):
        context.load_cert_chain(certificate, key)
        return
    with tempfile.TemporaryDirectory() as folder:  # mode 0700
        files = []
        for name, given in (("certificate", certificate), ("key", key)):
            path = Path(folder) / name
            data = (
                given.read_bytes() if isinstance(given, Path) else given.encode() if isinstance(given, str) else given
            )
            path.write_bytes(data)
            files.append(path)
        context.load_cert_chain(files[0], files[1])
