"""Every version of the objects of a cluster that a test asks about, as watches tell them."""

from __future__ import annotations

import ssl
import threading
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Self

import httpx

from cluster.scenarios.jobs import GROUP
from qlora_api.untrusted.deep_json import parse_json

if TYPE_CHECKING:
    from cluster.api import Object
    from cluster.control_plane import ControlPlane

COLLECTIONS = {
    "qlorajobs": f"{GROUP}/qlorajobs",
    "qlorasweeps": f"{GROUP}/qlorasweeps",
    "jobs": "/apis/batch/v1/jobs",
    "pods": "/api/v1/pods",
}

WATCH_SECONDS, PAUSE_SECONDS = 3, 0.05
"""Duration of one watch, and the pause before the next one."""


class History:
    """A context manager: records from its start on, in all namespaces."""

    def __init__(self, cluster: ControlPlane) -> None:
        self._cluster = cluster
        self._versions: dict[tuple[str, str], list[Object]] = defaultdict(list)
        self._http = httpx.Client(
            base_url=cluster.url,
            verify=ssl.create_default_context(cafile=cluster.authority.certificate),
            headers={"Authorization": f"Bearer {cluster.admin_token}"},
            timeout=httpx.Timeout(10),
            trust_env=False,
        )
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._record, args=item, name=f"history of {item[0]}", daemon=True)
            for item in COLLECTIONS.items()
        ]

    def of(self, plural: str, namespace: str) -> list[Object]:
        """All versions, the oldest first; the last one of an object that was deleted comes once more."""
        return list(self._versions[plural, namespace])

    def __enter__(self) -> Self:
        self._starts = {name: self._cluster.api.wait_for(path, bool) for name, path in COLLECTIONS.items()}
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A connection that is closed while another thread reads leaves an error of OpenSSL's behind, and what uses
        # TLS next in this thread fails of it. The API server ends each watch soon.
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._http.close()

    def _record(self, plural: str, path: str) -> None:
        version = self._starts[plural]["metadata"]["resourceVersion"]
        while not self._over.wait(PAUSE_SECONDS):
            asked = {"watch": "true", "resourceVersion": version, "timeoutSeconds": str(WATCH_SECONDS)}
            with suppress(httpx.TransportError), self._http.stream("GET", path, params=asked) as answer:
                if answer.status_code >= 500 or answer.status_code == 429:
                    continue
                for line in answer.iter_lines():
                    change = parse_json(line)
                    if change.get("type", "ERROR") == "ERROR":  # as after a change of the CustomResourceDefinition
                        listed = self._http.get(path, params={"limit": "1"}).json()
                        version = listed.get("metadata", {}).get("resourceVersion", version)
                        break
                    found = change["object"]
                    version = found["metadata"]["resourceVersion"]
                    self._versions[plural, found["metadata"]["namespace"]].append(found)
