"""Credentials with which the operator authenticates to the API server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qlora_operator.kube.kopf_import import kopf

log = logging.getLogger(__name__)

RENEW_SECONDS = 60
"""Age at which a token is read again, as client-go does: the kubelet renews that of a pod in place."""
PLAIN = frozenset(
    {
        "server",
        "certificate-authority-data",
        "insecure-skip-tls-verify",
        "proxy-url",
        "client-certificate-data",
        "client-key-data",
        "token",
        "username",
        "password",
    }
)
"""Fields of a kubeconfig's clusters and users that kopf reads as kubectl does."""


def load_credentials() -> kopf.ConnectionInfo:
    """Load credentials from $KUBECONFIG, else the pod's own account, else as kubectl would.

    Raises:
        kopf.LoginError: there is none of them.

    """
    settings = kopf.OperatorSettings()
    account = None if os.environ.get("KUBECONFIG") else kopf.login_with_service_account(settings=settings)
    if account:
        # By address, as client-go does: kopf's own answer needs the cluster's DNS before anything else.
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        return replace(account, server=f"https://{_bracketed(host)}:{port}") if host else account
    path = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    if _is_plain(path):
        found = kopf.login_with_kubeconfig(settings=settings)
    else:  # files, several of them, programs that give tokens: the official client knows them, and loads slowly
        found = kopf.login_via_client(settings=settings, logger=log)
    if not found:
        raise kopf.LoginError("no way to a cluster is configured: neither a pod's account nor a kubeconfig")
    return found


def cluster_identity(info: kopf.ConnectionInfo) -> str:
    """Return a hash of the CA certificates of the API server: what tells clusters apart and needs no right.

    Empty where there are none, or they cannot be read: then nothing is known to be in the same cluster.
    """
    try:
        data: str | bytes = Path(os.fsdecode(info.ca_path)).read_bytes() if info.ca_path else info.ca_data or b""
        text = data.encode() if isinstance(data, str) else data
        pem = text if b"-----BEGIN" in text else base64.b64decode(text)
    except (OSError, ValueError) as error:
        log.warning("the CA certificate of the API server cannot be read: %s", error)
        return ""
    return hashlib.sha256(b"".join(pem.split())).hexdigest()[:32] if pem.strip() else ""


def _is_plain(path: str) -> bool:
    """Return whether a kubeconfig is one file with everything in it.

    Raises:
        kopf.LoginError: it asks for what neither reader heeds.

    """
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        parts: list[dict[str, Any]] = [
            entry.get(kind) or {} for kind in ("cluster", "user") for entry in config.get(f"{kind}s") or ()
        ]
        keys = {key for part in parts for key in part}
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return False  # the official client says what is wrong
    if "tls-server-name" in keys:
        raise kopf.LoginError(f"{path}: tls-server-name is not supported: use kubectl proxy")
    return keys <= PLAIN


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Credentials:
    """The same, read again as it ages."""

    def __init__(self, info: kopf.ConnectionInfo) -> None:
        self.info, self._read = info, time.monotonic()

    async def headers(self) -> dict[str, str]:
        """Return the headers that authenticate a request. What cannot be read again just now is used as it was."""
        if time.monotonic() - self._read > RENEW_SECONDS:
            self._read = time.monotonic()
            try:
                self.info = await asyncio.to_thread(load_credentials)
            except Exception as error:  # noqa: BLE001 of files, of another program, of the client
                log.warning("credentials cannot be reloaded: %s", error)
        return self.info.as_http_headers()
