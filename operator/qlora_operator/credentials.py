"""Who the operator is to the API server."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace

from qlora_operator.lean import kopf

log = logging.getLogger(__name__)

RENEW_SECONDS = 60
"""Age at which a token is read again, as client-go does: the kubelet renews that of a pod in place."""


def load_credentials() -> kopf.ConnectionInfo:
    """The pod's own account in a cluster, else what kubectl would use.

    Raises:
        kopf.LoginError: there is neither.

    """
    settings = kopf.OperatorSettings()
    account = kopf.login_with_service_account(settings=settings)
    if account:
        # By address, as client-go does: kopf's own answer needs the cluster's DNS before anything else.
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        return replace(account, server=f"https://{_bracketed(host)}:{port}") if host else account
    found = kopf.login_with_kubeconfig(settings=settings)
    if found and (found.token or found.username or found.certificate_path or found.certificate_data):
        return found
    # What asks another program for its token. The official client knows how, and takes its time to load.
    found = kopf.login_via_client(settings=settings, logger=log)
    if not found:
        raise kopf.LoginError("no way to a cluster is configured: neither a pod's account nor a kubeconfig")
    return found


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Credentials:
    """The same, read again as it ages."""

    def __init__(self, info: kopf.ConnectionInfo) -> None:
        self.info, self._read = info, time.monotonic()

    def headers(self) -> dict[str, str]:
        """What a request says of who asks. What cannot be read again just now is used as it was."""
        if time.monotonic() - self._read > RENEW_SECONDS:
            self._read = time.monotonic()
            try:
                self.info = load_credentials()
            except Exception as error:  # noqa: BLE001 of files, of another program, of the client
                log.warning("credentials cannot be read again: %s", error)
        return self.info.as_http_headers()
