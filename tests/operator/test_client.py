"""What the operator makes of an API server's answers, as they come over HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from qlora_operator import client
from qlora_operator.client import Api, ApiError
from qlora_operator.lean import kopf

CHANGE = {"type": "ADDED", "object": {"metadata": {"name": "one"}}}
ERROR = {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}


async def watched(*lines, ends=True):
    """What a watch gives of these lines, from a server that ends it after them or says nothing more."""
    over = asyncio.Event()

    async def answer(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for line in lines:
            await response.write(json.dumps(line).encode() + b"\n")
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


def test_a_watch_gives_changes_until_the_server_ends_it():
    assert asyncio.run(watched(CHANGE, CHANGE)) == [CHANGE, CHANGE]


def test_silence_ends_a_watch_and_is_no_failure(monkeypatch):
    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.2)
    assert asyncio.run(watched(CHANGE, ends=False)) == [CHANGE]


def test_an_error_in_a_watch_is_the_api_servers():
    with pytest.raises(ApiError, match="410 Expired: too old"):
        asyncio.run(watched(CHANGE, ERROR))
