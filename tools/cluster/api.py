"""A small synchronous client of the Kubernetes API: JSON in, JSON out."""

from __future__ import annotations

import ssl
import time
from typing import TYPE_CHECKING, Any, Literal

import httpx

from qlora_api.untrusted.deep_json import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Object = dict[str, Any]
PATCH_TYPES = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "apply": "application/apply-patch+yaml",  # takes JSON
}
POLL_SECONDS = 0.05
REQUEST_SECONDS = 30
FIELD_MANAGER = "cluster-harness"


class ClusterApiError(Exception):
    """The API server refused. ``reason`` is the Status object's, such as ``NotFound`` or ``Invalid``."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason, self.message = status, reason, message


class ClusterApi:
    """Paths are as in the API's reference: ``/api/v1/namespaces/default/pods``. Closed by its cluster.

    Every call raises ``ClusterApiError`` on an answer that is not 2xx, and ``httpx.TransportError`` when there is none.
    """

    def __init__(self, url: str, authority: Path, token: str) -> None:
        self._http = httpx.Client(
            base_url=url,
            verify=ssl.create_default_context(cafile=authority),
            headers={"Authorization": f"Bearer {token}", "User-Agent": FIELD_MANAGER},
            timeout=REQUEST_SECONDS,
            trust_env=False,  # no proxy stands before this machine
        )
        self._resources: dict[str, dict[str, Object]] = {}

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **parameters: Any) -> Object:
        return self._call("GET", path, parameters)

    def list(self, path: str, **parameters: Any) -> list[Object]:
        """Items of a collection; ``labelSelector`` and such are parameters."""
        return list(self.get(path, **parameters)["items"])

    def post(self, path: str, body: Object, **parameters: Any) -> Object:
        return self._call("POST", path, parameters, json=body)

    def put(self, path: str, body: Object, **parameters: Any) -> Object:
        return self._call("PUT", path, parameters, json=body)

    def patch(
        self, path: str, body: Any, kind: Literal["merge", "json", "strategic", "apply"] = "merge", **parameters: Any
    ) -> Object:
        if kind == "apply":
            parameters = {"fieldManager": FIELD_MANAGER, "force": "true", **parameters}
        return self._call("PATCH", path, parameters, json=body, headers={"Content-Type": PATCH_TYPES[kind]})

    def delete(self, path: str, propagation: str = "Background", **parameters: Any) -> Object:
        return self._call("DELETE", path, {"propagationPolicy": propagation, **parameters})

    def text(self, path: str, **parameters: Any) -> str:
        """An answer that is not JSON, such as a pod's log."""
        return self._request("GET", path, parameters).text

    def create(self, manifest: Object, namespace: str = "") -> Object:
        """Create an object of any kind the server knows."""
        collection, _ = self._places(manifest, namespace)
        return self.post(collection, manifest)

    def apply(self, manifest: Object, namespace: str = "") -> Object:
        """Create or change an object of any kind the server knows, by server-side apply."""
        return self.patch(self.path_of(manifest, namespace), manifest, kind="apply")

    def path_of(self, manifest: Object, namespace: str = "") -> str:
        """Path of an object, by the server's own discovery. ``namespace`` stands in where the manifest has none."""
        collection, name = self._places(manifest, namespace)
        return f"{collection}/{name}"

    def wait_for(
        self, path: str, condition: Callable[[Object], Any], *, seconds: float = 30, what: str = "", **parameters: Any
    ) -> Object:
        """Read ``path`` until ``condition`` holds; the object it holds of. Absence and no answer are waited through.

        Raises:
            TimeoutError: with ``what`` was waited for and the last that was seen.

        """
        deadline, seen = time.monotonic() + seconds, "nothing yet"
        while True:
            try:
                found = self.get(path, **parameters)
                if condition(found):
                    return found
                seen = str(found)
            except ClusterApiError as error:
                if error.status < 500 and error.status not in (404, 429):
                    raise
                seen = str(error)
            except httpx.TransportError as error:
                seen = repr(error)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what or path}: not so after {seconds:g} s; last seen: {seen[-6000:]}")
            time.sleep(POLL_SECONDS)

    def wait_gone(self, path: str, seconds: float = 30) -> None:
        """Wait until there is no such object.

        Raises:
            TimeoutError: it is still there.

        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = self.get(path)
            except ClusterApiError as error:
                if error.reason == "NotFound":
                    return
                raise
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} is still there after {seconds:g} s: {str(found)[-6000:]}")
            time.sleep(POLL_SECONDS)

    def _places(self, manifest: Object, namespace: str) -> tuple[str, str]:
        version, kind, metadata = manifest["apiVersion"], manifest["kind"], manifest["metadata"]
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        if kind not in self._resources.get(root, {}):
            found = self.get(root)["resources"]
            self._resources[root] = {r["kind"]: r for r in found if "/" not in r["name"]}
        resource = self._resources[root][kind]
        where = f"/namespaces/{metadata.get('namespace') or namespace or 'default'}" if resource["namespaced"] else ""
        return f"{root}{where}/{resource['name']}", metadata.get("name", "")

    def _call(self, method: str, path: str, parameters: Object, **more: Any) -> Object:
        found: Object = parse_json(self._request(method, path, parameters, **more).content)
        return found

    def _request(self, method: str, path: str, parameters: Object, **more: Any) -> httpx.Response:
        answer = self._http.request(method, path, params=parameters, **more)
        if answer.is_success:
            return answer
        try:
            status = answer.json()
        except ValueError:
            status = {}
        raise ClusterApiError(answer.status_code, status.get("reason", ""), status.get("message", answer.text))
