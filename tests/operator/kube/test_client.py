"""Answers of an API server as they come over HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import ClientConnectorError, web

from qlora_operator.kube import client
from qlora_operator.kube.bounded_reads import LARGEST_BYTES, TooLargeError
from qlora_operator.kube.client import PAGE, Api, ApiError, NotLeadingError
from qlora_operator.kube.kopf_import import kopf

CHANGE = {"type": "ADDED", "object": {"metadata": {"name": "one"}}}
ERROR = {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}


async def watched(*lines, ends=True):
    """Return the events of a watch of these lines, as JSON or as they are; the server ends it or says nothing more."""
    over = asyncio.Event()

    async def answer(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for line in lines:
            await response.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
        if not ends:
            await over.wait()
        return response

    app = web.Application()
    app.router.add_get("/api/v1/pods", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    api = Api(kopf.ConnectionInfo(server=f"http://127.0.0.1:{runner.addresses[0][1]}"), lambda *_: None)
    try:
        return [change async for change in api.watch("/api/v1/pods")]
    finally:
        over.set()
        await api.close()
        await runner.cleanup()


def test_who_may_not_write_reads_and_sends_nothing_else():
    async def calls() -> None:
        api = Api(kopf.ConnectionInfo(server="http://127.0.0.1:9"), lambda *_: None, may_write=lambda: False)
        try:
            for write in (api.create("/x", {}), api.patch("/x", {}), api.delete("/x")):
                with pytest.raises(NotLeadingError):
                    await write
            with pytest.raises(ClientConnectorError):
                await api.get("/x")
        finally:
            await api.close()

    asyncio.run(calls())


def test_a_watch_gives_changes_until_the_server_ends_it():
    assert asyncio.run(watched(CHANGE, CHANGE)) == [CHANGE, CHANGE]


def test_silence_ends_a_watch_and_is_no_failure(monkeypatch):
    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.2)
    assert asyncio.run(watched(CHANGE, ends=False)) == [CHANGE]


def test_an_error_in_a_watch_is_the_api_servers():
    with pytest.raises(ApiError, match="410 Expired: too old"):
        asyncio.run(watched(CHANGE, ERROR))


LARGE = {"type": "ADDED", "object": {"metadata": {"name": "<" * 1_500_000}}}


def as_the_api_server_writes_it(change):
    return json.dumps(change).replace("<", "\\u003c").encode()


def test_a_change_may_be_as_large_as_etcd_makes_it():
    text = as_the_api_server_writes_it(LARGE)
    assert len(text) > 9_000_000
    assert asyncio.run(watched(text, CHANGE)) == [LARGE, CHANGE]


def test_a_change_may_be_nested_as_deep_as_the_api_server_takes_it():
    depth = 9_900
    text = b'{"type": "ADDED", "object": {"metadata": ' + b'{"f:a":' * depth + b"{}" + b"}" * depth + b"}}"
    nested, then = asyncio.run(watched(text, CHANGE))
    assert (nested["type"], then) == ("ADDED", CHANGE)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"x" * (LARGEST_BYTES + 1), id="more-than-etcd-holds"),
        pytest.param(b"{", id="no-json"),
        pytest.param(b"[" * 200_000, id="deeper-than-any-api-server-writes"),
        pytest.param(b"[]", id="no-object"),
        pytest.param(b'{"type": "ADDED"}', id="no-change"),
    ],
)
def test_a_line_that_cannot_be_read_is_left_out_and_the_next_one_is_read(line):
    assert asyncio.run(watched(CHANGE, line, CHANGE)) == [CHANGE, None, CHANGE]


def test_a_change_that_breaks_off_is_not_taken():
    assert asyncio.run(watched(CHANGE, b'{"type": "ADDED", "object": {}}'[:-1])) == [CHANGE, None]


async def listed(sizes, path="/api/v1/pods"):
    """Pages in which objects of these sizes are listed, and the limits that were asked for."""
    limits = []

    async def answer(request):
        limit, start = int(request.query["limit"]), int(request.query["continue"] or 0)
        limits.append(limit)
        end = min(start + limit, len(sizes))
        items = [{"metadata": {"name": f"{number}", "large": "x" * sizes[number]}} for number in range(start, end)]
        token = str(end) if end < len(sizes) else ""
        return web.json_response({"metadata": {"resourceVersion": "1", "continue": token}, "items": items})

    app = web.Application()
    app.router.add_get(path, answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    api = Api(kopf.ConnectionInfo(server=f"http://127.0.0.1:{runner.addresses[0][1]}"), lambda *_: None)
    try:
        return [[i["metadata"]["name"] for i in page["items"]] async for page in api.pages(path, {})], limits
    finally:
        await api.close()
        await runner.cleanup()


def test_a_page_of_large_objects_is_asked_for_in_smaller_ones_and_nothing_is_missed():
    pages, limits = asyncio.run(listed([10] * 3 + [3_000_000] * 20 + [10] * 30))
    assert [name for page in pages for name in page] == [str(number) for number in range(53)]
    assert limits[0] == PAGE
    assert min(limits) < PAGE // 8


def test_an_object_that_alone_is_larger_than_etcd_makes_it_is_an_error():
    with pytest.raises(TooLargeError):
        asyncio.run(listed([LARGEST_BYTES + 1]))
