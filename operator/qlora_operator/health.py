"""``/metrics``, ``/healthz`` and ``/readyz``.

Alive means: every watch was asked for anew within its time. A watch that ended for good (kopf#1276) asks no more, and
no other sign shows it. That the API server answers is not asked: a restart of the operator would not mend it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

WATCH_SECONDS = 120
"""The API server ends a watch after this long, and kopf asks for the next one."""
SLACK_SECONDS = 120
"""For a connection that hangs until its timeout, and for back-off."""


class Watches:
    """When each watch was last asked for."""

    def __init__(self, resources: Sequence[str]) -> None:
        """``resources``: plurals, as they end the paths of watches."""
        self._asked: dict[str, float] = dict.fromkeys(resources, 0.0)
        self._started = time.monotonic()

    def note(self, path: str) -> None:
        """Take in the path of a request of kopf's."""
        found = re.search(r"/([a-z]+)\?.*watch=true", path)
        if found and found[1] in self._asked:
            self._asked[found[1]] = time.monotonic()

    def stale(self) -> list[str]:
        """Watches that should have been asked for again and were not."""
        limit = time.monotonic() - WATCH_SECONDS - SLACK_SECONDS
        return [name for name, at in self._asked.items() if max(at, self._started) < limit]

    def missing(self) -> list[str]:
        """Watches that never were."""
        return [name for name, at in self._asked.items() if not at]


async def serve(registry: CollectorRegistry, watches: Watches, port: int) -> web.AppRunner:
    """Serve until ``cleanup``; port 0 takes any free one."""

    async def metrics(request: web.Request) -> web.Response:
        encode, kind = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": kind})

    def state(troubles: list[str], what: str) -> web.Response:
        if troubles:
            return web.Response(status=503, text=f"{what}: {', '.join(troubles)}\n")
        return web.Response(text="ok\n")

    async def healthz(_: web.Request) -> web.Response:
        return state(watches.stale(), "watches that do not move")

    async def readyz(_: web.Request) -> web.Response:
        return state(watches.missing(), "not watched yet")

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
