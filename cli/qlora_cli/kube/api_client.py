"""A small client of the Kubernetes API: JSON in, JSON out, watches and logs as they come."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import httpx

from qlora_api.untrusted.deep_json import parse_json
from qlora_cli.kube import authentication
from qlora_cli.kube.errors import KubeApiError, UnreachableError
from qlora_cli.kube.names import FIELD_MANAGER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlora_cli.kube.kubeconfig import Access

REQUEST_SECONDS = 30
CONNECT_SECONDS = 10
PAGE = 500
WATCH_SECONDS = 290
SILENCE_SECONDS = 150
"""Longest time without an event on a watch. The API server sends a bookmark about once a minute, so a connection that
is silent for longer is dead."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0
GONE = 410

Object = dict[str, Any]


@dataclass(frozen=True)
class Event:
    """Event of a watch.

    ``kind`` is ADDED, MODIFIED or DELETED with one object; LISTED with all there are, at the start and whenever
    something may have been missed; LOST with none and a text, when the connection is gone and will be tried again.
    """

    kind: str
    items: tuple[Object, ...] = ()
    text: str = ""


class ApiClient:
    """One cluster. A context manager; may be used from several threads.

    Every call raises ``KubeApiError`` on an answer that is a refusal, and ``UnreachableError`` where there is none.
    """

    def __init__(self, access: Access) -> None:
        """Raises ConfigError: no credentials can be made of what the kubeconfig says."""
        self.server, self.context = access.server, access.context
        self._closed = False
        identity = authentication.Identity(access)
        self._extensions = {"sni_hostname": access.tls_server_name} if access.tls_server_name else {}
        self._http = httpx.Client(
            base_url=access.server,
            auth=identity,
            verify=authentication.tls(access, identity.credential),
            proxy=access.proxy or None,
            headers={"User-Agent": FIELD_MANAGER, "Accept": "application/json"},
            timeout=httpx.Timeout(REQUEST_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections; whoever follows in another thread ends without a word."""
        self._closed = True
        self._http.close()

    # ------------------------------------------------------------------------------------------------------ requests

    def get(self, path: str, **parameters: Any) -> Object:
        return self._call("GET", path, parameters)

    def list(self, path: str, **parameters: Any) -> tuple[list[Object], str]:
        """Return all items, page by page, and the resourceVersion of the list."""
        items: list[Object] = []
        parameters["limit"] = PAGE
        while True:
            page = self.get(path, **parameters)
            items += page.get("items") or []
            meta = page.get("metadata") or {}
            parameters["continue"] = meta.get("continue")
            if not parameters["continue"]:
                return items, meta.get("resourceVersion", "")

    def create(self, path: str, body: Object, *, dry_run: bool = False) -> Object:
        return self._call("POST", path, {**_writes(dry_run=dry_run), "fieldValidation": "Strict"}, json=body)

    def ask(self, path: str, body: Object) -> Object:
        """Post what is only a question, such as a SelfSubjectAccessReview."""
        return self._call("POST", path, {}, json=body)

    def merge(self, path: str, patch: Object, *, dry_run: bool = False) -> Object:
        """Change some fields."""
        kind = {"Content-Type": "application/merge-patch+json"}
        return self._call("PATCH", path, _writes(dry_run=dry_run), json=patch, headers=kind)

    def delete(self, path: str) -> Object:
        return self._call("DELETE", path, {"propagationPolicy": "Background"})

    def lines(self, path: str, **parameters: Any) -> Iterator[bytes]:
        """Yield the lines of an answer as they come, without their ends. A silent stream is waited for."""
        yield from self._lines(path, parameters, httpx.Timeout(CONNECT_SECONDS, read=None))

    def follow(self, path: str, **parameters: Any) -> Iterator[Event]:
        """List, then watch, for ever: what ends or breaks is taken up again.

        Raises:
            KubeApiError: the first list is refused. Later refusals are told as LOST.

        """
        wait, version, known = FIRST_WAIT_SECONDS, "", False
        while True:
            try:
                if not version:
                    items, version = self.list(path, **parameters)
                    known = True
                    yield Event("LISTED", tuple(items))
                for event in self._watched(path, version, parameters):
                    wait = FIRST_WAIT_SECONDS
                    body = event["object"]
                    if event["type"] == "ERROR":  # mostly: the version is too old
                        version = ""
                        break
                    version = body["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        yield Event(event["type"], (body,))
            except (KubeApiError, UnreachableError) as error:
                if self._closed:
                    return
                if not known:
                    raise
                version = "" if isinstance(error, KubeApiError) else version
                if not (isinstance(error, KubeApiError) and error.code == GONE):
                    yield Event("LOST", text=str(error))
                    time.sleep(wait)
                    wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    # --------------------------------------------------------------------------------------------------- underneath

    def _watched(self, path: str, version: str, parameters: Object) -> Iterator[Object]:
        asked = {
            **parameters,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": WATCH_SECONDS,
        }
        for line in self._lines(path, asked, httpx.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS)):
            yield parse_json(line)

    def _lines(self, path: str, parameters: Object, timeout: httpx.Timeout) -> Iterator[bytes]:
        with self._answers():
            request = self._http.build_request(
                "GET", path, params=_given(parameters), timeout=timeout, extensions=dict(self._extensions)
            )
            answer = self._http.send(request, stream=True)
            try:
                if not answer.is_success:
                    answer.read()
                    raise self._refused(answer, path)
                rest = b""
                for piece in answer.iter_bytes():  # not iter_lines: it splits at characters that JSON and logs may hold
                    *whole, rest = (rest + piece).split(b"\n")
                    yield from whole
                if rest:
                    yield rest
            finally:
                answer.close()

    def _call(self, method: str, path: str, parameters: Object, **more: Any) -> Object:
        with self._answers():
            answer = self._http.request(
                method, path, params=_given(parameters), extensions=dict(self._extensions), **more
            )
        if not answer.is_success:
            raise self._refused(answer, path)
        try:
            found = parse_json(answer.content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UnreachableError(f"{self.server} is no Kubernetes API server: it answers {answer.text[:80]!r}")
        return found

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Turn what the transport says into a line for a person."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise UnreachableError(f"{self._where()} does not answer in time ({type(error).__name__})") from None
        except httpx.TransportError as error:
            raise UnreachableError(f"{self._where()} cannot be reached: {_message(error)}") from None
        except Exception:
            if self._closed:  # under the feet of a thread that reads, anything may happen
                raise UnreachableError(f"{self._where()}: the connection is closed") from None
            raise

    def _refused(self, answer: httpx.Response, path: str) -> KubeApiError | UnreachableError:
        try:
            status = answer.json()
        except ValueError:
            status = None
        if not isinstance(status, dict):
            status = {"message": answer.text.strip()[:300]}
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            return UnreachableError(f"{self._where()} does not know you (401): renew the credentials of this context")
        return KubeApiError(answer.status_code, status, path)

    def _where(self) -> str:
        return f"{self.server} (context {self.context})" if self.context else self.server


def _writes(*, dry_run: bool) -> Object:
    return {"fieldManager": FIELD_MANAGER, "dryRun": "All" if dry_run else None}


def _given(parameters: Object) -> Object:
    return {name: value for name, value in parameters.items() if value is not None}


def _message(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in text:
        cause = text.rsplit(": ", 1)[-1]
        return f"its certificate is not trusted ({cause}); see certificate-authority-data in the kubeconfig"
    return text
