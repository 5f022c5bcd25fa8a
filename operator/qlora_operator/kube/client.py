"""The operator's few calls to the API server. What a call answers is plain JSON.

The official client's generated classes are not used: importing the one for pods alone takes 100 MB, more than all else
the operator needs (docs/decisions/0008).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Protocol
from urllib.parse import urlencode

import aiohttp
from yarl import URL

from qlora_api.untrusted.deep_json import parse_json
from qlora_api.untrusted.printable import printable
from qlora_operator.kube.authentication import Credentials
from qlora_operator.kube.bounded_reads import TooLargeError, lines, read_within
from qlora_operator.kube.kopf_import import kopf
from qlora_operator.kube.server_clock import ServerClock
from qlora_operator.names import FIELD_MANAGER

Object = dict[str, Any]
TRANSIENT = (aiohttp.ClientError, TimeoutError, OSError)
"""No answer: it may come a little later."""
USER_AGENT = "qlora-operator"
TIMEOUT = aiohttp.ClientTimeout(total=30)
WATCH_SECONDS = 120
"""The API server ends a watch after this long, and kopf asks for the next one."""
SILENCE_SECONDS = 70
"""A watch without an event for so long is restarted; the API server sends a bookmark each minute."""
CONNECT_SECONDS = 10
PAGE = 80
"""Most objects of one answer: a pod is 10 KB as text, and three to ten times that when it is parsed. Smaller pages take
less memory and more time: with 1,000 jobs, pages of 100 take 10 MB more than pages of 50, and pages of 200 take 25 MB
more (docs/scale.md)."""
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
"""A list of metadata alone, a fraction of the whole objects' size."""
MERGE_PATCH = "application/merge-patch+json"


class ApiError(Exception):
    """An answer that is not 2xx. ``reason`` is the Status object's: NotFound, AlreadyExists, Conflict, Invalid …"""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        self.message = printable(message)  # it quotes what others wrote
        super().__init__(f"{status} {reason}: {self.message}")
        self.status, self.reason, self.retry_after = status, reason, retry_after

    @property
    def is_transient(self) -> bool:
        """Return whether the same call may go through a little later."""
        return self.status in (408, 409, 429) or self.status >= 500


def retry_after(error: Exception) -> float:
    """Return for how many seconds the API server asks not to be asked again; 0: it does not say."""
    return error.retry_after or 0.0 if isinstance(error, ApiError) and error.is_transient else 0.0


class NotLeadingError(Exception):
    """Another replica may lead by now: nothing is written."""


class RequestObserver(Protocol):
    """Told of every request: verb, status code (0: no answer), seconds."""

    def __call__(self, verb: str, code: int, seconds: float) -> None: ...


class Api:
    """JSON in, JSON out. Paths are as in the API's reference.

    Every call raises :class:`ApiError`, or ``aiohttp.ClientError`` and ``TimeoutError`` when there is no answer.
    """

    def __init__(
        self,
        info: kopf.ConnectionInfo,
        count: RequestObserver,
        concurrency: int = 16,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        self._host = info.server.rstrip("/")
        self._credentials = Credentials(info)
        self._count, self._may_write = count, may_write
        self.clock = ServerClock()
        """Clock of the API server."""
        self._slots = asyncio.Semaphore(concurrency)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
            proxy=info.proxy_url,
        )

    async def close(self) -> None:
        await self._session.close()

    async def get(self, path: str, **parameters: str | int) -> Object:
        return await self._call("GET", path, parameters)

    async def pages(
        self, path: str, parameters: Mapping[str, str], *, metadata_only: bool = False
    ) -> AsyncIterator[Object]:
        """List a collection page by page, each of no more objects than the operator has room for.

        Raises:
            TooLargeError: one object alone is more than etcd can hold.

        """
        accept = METADATA_LIST if metadata_only else "application/json"
        limit, token = PAGE, ""
        while True:
            try:
                page = await self._call("GET", path, {**parameters, "limit": limit, "continue": token}, accept=accept)
            except TooLargeError:
                if limit == 1:
                    raise
                limit = max(1, limit // 8)
                continue
            yield page
            limit, token = min(PAGE, limit * 2), page["metadata"].get("continue", "")
            if not token:
                return

    async def create(self, path: str, body: Mapping[str, Any]) -> Object:
        return await self._call("POST", path, {"fieldManager": FIELD_MANAGER}, body)

    async def patch(self, path: str, body: Mapping[str, Any]) -> Object:
        """JSON merge patch, RFC 7396."""
        return await self._call("PATCH", path, {"fieldManager": FIELD_MANAGER}, body, MERGE_PATCH)

    async def delete(self, path: str, uid: str | None = None, propagation: str = "Background") -> bool:
        """Delete; that it is gone already is as good. Whether it was there."""
        body: Object = {"propagationPolicy": propagation}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            await self._call("DELETE", path, {}, body)
        except ApiError as error:
            if error.status not in (404, 409):  # 409: another one of that name by now
                raise
            return False
        return True

    async def watch(self, path: str, **parameters: str | int) -> AsyncIterator[Object | None]:
        """Each change as ``{"type": …, "object": …}``, until the API server ends the watch, or nothing comes any more.

        None stands for a change that cannot be read: larger than anything that etcd holds, or no object.

        Silence is no failure: Events have no bookmarks, and of a connection that is dead nothing else is heard either.
        """
        parameters = {"watch": "true", "allowWatchBookmarks": "true", **parameters}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        async with await self._ask("GET", path, parameters, timeout=timeout) as answer:
            if answer.status != 200:
                raise _error(answer.status, await read_within(answer.content), answer.headers)
            with suppress(aiohttp.SocketTimeoutError):
                async for line in lines(answer.content):
                    change = read_change(line)
                    if change and change["type"] == "ERROR":
                        status = change["object"]
                        raise ApiError(status.get("code", 0), status.get("reason", ""), status.get("message", ""))
                    yield change

    async def _call(
        self,
        verb: str,
        path: str,
        parameters: Mapping[str, str | int],
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Object:
        if verb != "GET" and not self._may_write():
            raise NotLeadingError
        started, code = time.monotonic(), 0
        try:
            async with self._slots, await self._ask(verb, path, parameters, body, content_type, accept) as answer:
                text = await read_within(answer.content)
                code = answer.status
                self.clock.note(answer.headers.get("Date"))
        finally:
            self._count(verb, code, time.monotonic() - started)
        if not 200 <= code < 300:
            raise _error(code, text, answer.headers)
        found: Object = parse_json(text)
        return found

    async def _ask(
        self,
        verb: str,
        path: str,
        parameters: Mapping[str, str | int],
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        timeout: aiohttp.ClientTimeout = TIMEOUT,  # noqa: ASYNC109 aiohttp's own, with a part for each phase
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """A request, sent as the answer is entered."""
        query = f"?{urlencode(parameters)}" if parameters else ""
        headers: dict[str, str] = {
            "Accept": accept,
            "Accept-Encoding": "identity",  # to pack and unpack a list takes both sides longer than to send it
            "Content-Type": content_type,
            "User-Agent": USER_AGENT,
            **await self._credentials.headers(),
        }
        return self._session.request(
            verb,
            URL(f"{self._host}{path}{query}", encoded=True),
            headers=headers,
            data=None if body is None else json.dumps(body).encode(),
            timeout=timeout,
        )


def _error(code: int, text: bytes, headers: Mapping[str, str]) -> ApiError:
    try:
        status = parse_json(text)
    except ValueError:
        status = {}
    if not isinstance(status, dict):
        status = {}
    after = headers.get("Retry-After", "")
    message = status.get("message") or text[:500].decode(errors="replace")
    return ApiError(code, status.get("reason", ""), message, float(after) if after.isdecimal() else None)


def read_change(line: bytes | None) -> Object | None:
    """Return a change of a watch; None where it is none."""
    try:
        change = parse_json(line) if line else None
    except ValueError:
        return None
    readable = isinstance(change, dict) and isinstance(change.get("object"), dict) and "type" in change
    return change if readable else None
