"""Keep nothing in memory of a sweep that is gone."""

from __future__ import annotations

import asyncio

from aiohttp import web

from operator_builders import CONFIG
from qlora_operator.act.sweeps.reconcile_sweeps import SweepReconciler
from qlora_operator.kube.client import Api
from qlora_operator.kube.kopf_import import kopf
from qlora_operator.serve.metrics import Metrics
from qlora_operator.state.cache import ObjectCache
from qlora_operator.state.sweep_cache import SweepCache
from sweep_builders import UID, says, sweep, trial_job

KEY = ("team", "search")


def test_nothing_is_kept_of_the_trials_of_a_sweep_that_was_deleted():
    held = sweep(suspend=True).to_json_dict()
    job = trial_job(conditions=[says("Failed", "UserError")]).to_json_dict()
    owner = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRASweep", "name": "search", "uid": UID, "controller": True}
    job["metadata"]["ownerReferences"] = [owner]

    async def written(_):
        return web.json_response({**held, "metadata": {**held["metadata"], "resourceVersion": "6"}})

    async def posted(_):
        return web.json_response({})

    async def run():
        app = web.Application()
        app.router.add_patch("/{path:.*}", written)
        app.router.add_post("/{path:.*}", posted)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        api = Api(kopf.ConnectionInfo(server=f"http://127.0.0.1:{runner.addresses[0][1]}"), lambda *_: None)
        sweeps, jobs = SweepCache(), ObjectCache()
        reconciler = SweepReconciler(sweeps, jobs, api, CONFIG, Metrics(jobs, sweeps), lambda _: None)
        sweeps.take(held)
        jobs.take_job(job)
        try:
            await reconciler._reconcile(KEY)
            assert len(reconciler._settled) == 1
            sweeps.drop(held)
            await reconciler._reconcile(KEY)
        finally:
            await api.close()
            await runner.cleanup()
        return reconciler

    assert asyncio.run(run())._settled == {}
