"""Writes of a sweep's status to an API server that has more in it than this version understands."""

from __future__ import annotations

import asyncio

from aiohttp import web

from qlora_operator.act.sweeps.sweep_status_writer import SweepStatusWriter
from qlora_operator.kube.client import Api
from qlora_operator.kube.kopf_import import kopf
from qlora_operator.state.sweep_cache import SweepCache

KEY = ("team", "search")
PATH = "/apis/qlora.dev/v1alpha1/namespaces/team/qlorasweeps/search/status"


class NewerServer:
    """Serves one QLoRASweep whose status has a value of a later version."""

    def __init__(self):
        meta = {"name": "search", "namespace": "team", "uid": "u", "generation": 1, "resourceVersion": "5"}
        self.body = {"metadata": meta, "spec": {}, "status": {"gpuSeconds": 1.5}}
        self.writes = 0

    async def patch(self, request):
        """Answer a merge patch of status."""
        change = (await request.json())["status"]
        self.writes += 1
        meta = self.body["metadata"] | {"resourceVersion": str(5 + self.writes)}
        self.body = {**self.body, "metadata": meta, "status": {**self.body["status"], **change}}
        return web.json_response(self.body)


def test_a_sweep_whose_status_is_not_understood_is_told_so_once():
    server, cache = NewerServer(), SweepCache()

    async def run():
        app = web.Application()
        app.router.add_patch(PATH, server.patch)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        api = Api(kopf.ConnectionInfo(server=f"http://127.0.0.1:{runner.addresses[0][1]}"), lambda *_: None)
        writer = SweepStatusWriter(cache, api, 15, lambda *_: None)
        try:
            for _ in range(2):
                await writer.write_unknown_fields(KEY, server.body, ValueError("status.gpuSeconds"))
        finally:
            await api.close()
            await runner.cleanup()

    asyncio.run(run())
    (condition,) = server.body["status"]["conditions"]
    assert (condition["type"], condition["reason"]) == ("Degraded", "NotUnderstood")
    assert condition["message"] == "this version of the operator leaves the sweep unchanged: status.gpuSeconds"
    assert server.writes == 1
    assert cache.get(KEY).version == 6
