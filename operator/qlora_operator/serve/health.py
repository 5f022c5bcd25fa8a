"""``/metrics``, ``/healthz`` and ``/readyz``.

Alive means: every watch was asked for anew within its time. A watch that ended for good (kopf#1276) asks no more, and
no other sign shows it. That the API server answers is not asked: a restart of the operator would not mend it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from qlora_operator.kube.client import WATCH_SECONDS

SLACK_SECONDS = 120
"""For a connection that hangs until its timeout, and for back-off."""


class Watches:
    """Times of the last request of each watch.

    Args:
        resources: plurals, as they end the paths of watches.
        each: watches of each: one, or as many as there are namespaces.
        clock: in seconds.

    """

    def __init__(self, resources: Sequence[str], each: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._resources, self._each, self._clock = tuple(resources), each, clock
        self._asked: dict[str, float] = {}
        self._started = clock()

    def begin(self) -> None:
        """Measure from now on: this process was on standby until now."""
        self._started = self._clock()

    def note(self, path: str) -> None:
        """Take in the path of a request of kopf's."""
        place, _, query = path.partition("?")
        if "watch=true" in query and place.rpartition("/")[2] in self._resources:
            self._asked[place] = self._clock()

    def stale(self) -> list[str]:
        """Watches that should have been asked for again and were not, by resource, and by path where there are many."""
        limit = self._clock() - WATCH_SECONDS - SLACK_SECONDS
        late = [place for place, at in self._asked.items() if at < limit]
        never = self.missing() if self._started < limit else []
        return [*(place if self._each > 1 else place.rpartition("/")[2] for place in late), *never]

    def missing(self) -> list[str]:
        """Watches that were never established."""
        there = Counter(place.rpartition("/")[2] for place in self._asked)
        return [name for name in self._resources if there[name] < self._each]


async def serve(
    registry: CollectorRegistry, watches: Watches, port: int, standby: Callable[[], str] = str
) -> web.AppRunner:
    """Serve until ``cleanup``; port 0 takes any free one. A process on standby is healthy."""

    async def metrics(request: web.Request) -> web.Response:
        encode, kind = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": kind})

    def state(troubles: list[str], what: str) -> web.Response:
        if text := standby():
            return web.Response(text=f"{text}\n")
        if troubles:
            return web.Response(status=503, text=f"{what}: {', '.join(troubles)}\n")
        return web.Response(text="ok\n")

    async def healthz(_: web.Request) -> web.Response:
        return state(watches.stale(), "watches without progress")

    async def readyz(_: web.Request) -> web.Response:
        return state(watches.missing(), "not watched yet")

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
