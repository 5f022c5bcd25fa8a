"""The HTTP session of kopf's watch of QLoRAJobs: kopf is given no more of an object than the cache keeps.

kopf parses what comes as it is, keeps whole objects for a while, and ends its watch for good on one that it cannot
parse. A list it holds whole before it tells of the first object: as texts, objects take a fifth of the memory.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp

from qlora_api.untrusted.deep_json import parse_json
from qlora_operator.kube.bounded_reads import lines
from qlora_operator.kube.client import USER_AGENT, Object, read_change
from qlora_operator.kube.kopf_import import kopf
from qlora_operator.state.cache import kept_of
from qlora_operator.state.skip_reasons import UNREADABLE

Skipped = Callable[[str, str], None]
"""Told plural and reason of each object that is left out."""
PLURAL = "qlorajobs"
_KEPT = "kept"
"""Field of an object for kopf with all that is kept, as JSON."""


def watching_session(info: kopf.ConnectionInfo, on_request: Callable[[str], None], skipped: Skipped) -> Any:
    """A session with the operator's credentials; ``on_request`` is told each path as it is asked."""
    trace = aiohttp.TraceConfig()

    async def started(_session: object, _context: object, request: aiohttp.TraceRequestStartParams) -> None:
        on_request(str(request.url.path_qs))

    class Response(TrimmedResponse):
        """One that tells of what it leaves out."""

        on_skipped = staticmethod(skipped)

    trace.on_request_start.append(started)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
        headers={"User-Agent": f"{USER_AGENT}/watch", **info.as_http_headers()},
        proxy=info.proxy_url,
        trace_configs=[trace],
        response_class=Response,
    )


class TrimmedResponse(aiohttp.ClientResponse):
    """An answer of the API server, in which QLoRAJobs are cut to what the cache keeps."""

    on_skipped: Skipped = staticmethod(lambda _plural, _reason: None)

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        await super().start(connection)
        if self.url.query.get("watch") == "true":
            self.content = _TrimmedChanges(self.content, self.on_skipped)  # type: ignore[assignment]
        return self

    async def json(self, **_: Any) -> Any:
        found = parse_json(await self.read())
        if isinstance(found, dict) and found.get("kind") == "QLoRAJobList":
            found["items"] = [kept for item in found["items"] or () if (kept := _cut(item, self.on_skipped))]
        return found


class _TrimmedChanges:
    """The lines of a watch, each with its object cut."""

    def __init__(self, content: aiohttp.StreamReader, skipped: Skipped) -> None:
        self._content, self._skipped = content, skipped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, _: int) -> AsyncIterator[bytes]:
        async for line in lines(self._content):
            change = read_change(line)
            if change is None:
                self._skipped(PLURAL, UNREADABLE)
                continue
            if change["type"] in ("ADDED", "MODIFIED", "DELETED"):
                change["object"] = _cut(change["object"], self._skipped)
            if change["object"]:
                yield json.dumps(change).encode() + b"\n"


def kept_in(body: Mapping[str, Any]) -> Object:
    """Return what the cache keeps of an object that kopf tells of."""
    kept: Object = json.loads(body[_KEPT])
    return kept


def _cut(body: Mapping[str, Any], skipped: Skipped) -> Object | None:
    """Return an object of which kopf sees the metadata, and the rest is one text."""
    try:
        kept = kept_of(body)
    except (KeyError, TypeError, ValueError):
        skipped(PLURAL, UNREADABLE)
        return None
    read = {name: kept[name] for name in ("apiVersion", "kind", "metadata")}
    return {**read, _KEPT: json.dumps(kept, separators=(",", ":"))}
