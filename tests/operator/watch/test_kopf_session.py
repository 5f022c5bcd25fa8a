"""Input of kopf: no more than the cache keeps, and nothing that it cannot parse."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from qlora_operator.kube.kopf_import import kopf
from qlora_operator.watch.kopf_session import kept_in, watching_session

DEPTH = 9_000
NESTED = '{"f:a":' * DEPTH + "{}" + "}" * DEPTH
META = {"name": "job", "namespace": "team", "uid": "u", "resourceVersion": "7"}
JOB = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": META, "spec": {"suspend": True}}
LARGE = {**JOB, "metadata": {**META, "labels": {f"l{n}": "x" * 60 for n in range(15_000)}, "managedFields": "NESTED"}}
BOOKMARK = {"type": "BOOKMARK", "object": {"kind": "QLoRAJob", "metadata": {"resourceVersion": "8"}}}
GONE = {"type": "ERROR", "object": {"code": 410}}


def text(value):
    return json.dumps(value).replace('"NESTED"', NESTED)


async def answered(body, read, query=""):
    """Return what is read of an answer, the paths that were asked for, and what was left out."""
    paths, skipped = [], []

    async def answer(_):
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/jobs", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server = f"http://127.0.0.1:{runner.addresses[0][1]}"
    session = watching_session(kopf.ConnectionInfo(server=server), paths.append, lambda *left: skipped.append(left))
    try:
        async with session, session.get(f"{server}/jobs{query}") as response:
            return await read(response), paths, skipped
    finally:
        await runner.cleanup()


async def changes(response):
    return [json.loads(line) async for line in response.content.iter_chunked(1024)]


async def whole(response):
    return await response.json()


def test_a_list_has_of_each_job_what_the_store_keeps():
    listed = {"kind": "QLoRAJobList", "metadata": {"resourceVersion": "9"}, "items": [LARGE, JOB]}
    found, paths, skipped = asyncio.run(answered(text(listed).encode(), whole))
    assert [kept_in(item) for item in found.pop("items")] == [JOB, JOB]
    assert found == {name: value for name, value in listed.items() if name != "items"}
    assert (paths, skipped) == (["/jobs"], [])


def test_a_watch_has_too_and_bookmarks_and_errors_as_they_are():
    lines = [{"type": kind, "object": LARGE} for kind in ("ADDED", "MODIFIED", "DELETED")]
    body = "\n".join(map(text, [*lines, BOOKMARK, GONE])).encode() + b"\n"
    found, paths, skipped = asyncio.run(answered(body, changes, "?watch=true"))
    assert [(change["type"], kept_in(change["object"])) for change in found[:3]] == [(x["type"], JOB) for x in lines]
    assert all(change["object"]["metadata"] == META for change in found[:3]), "what kopf looks at"
    assert found[3:] == [BOOKMARK, GONE]
    assert (paths, skipped) == (["/jobs?watch=true"], [])


@pytest.mark.parametrize("line", [b"[" * 50_000, b"{", b'{"type": "ADDED", "object": {"metadata": {}}}'])
def test_what_cannot_be_read_is_left_out_and_counted(line):
    body = line + b"\n" + text({"type": "ADDED", "object": JOB}).encode() + b"\n"
    found, _, skipped = asyncio.run(answered(body, changes, "?watch=true"))
    assert [(change["type"], kept_in(change["object"])) for change in found] == [("ADDED", JOB)]
    assert skipped == [("qlorajobs", "Unreadable")]


def test_other_answers_are_as_they_are():
    found, _, _ = asyncio.run(answered(b'{"kind": "APIResourceList", "resources": []}', whole))
    assert found == {"kind": "APIResourceList", "resources": []}
