"""Writes of status to an API server with an older definition, which stores less than it is asked to."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from operator_builders import NOW, job
from qlora_api.status import Condition, QLoRAJobStatus
from qlora_operator.act import repeated_writes
from qlora_operator.act.status_writer import StatusWriter
from qlora_operator.decide.decision import Decision
from qlora_operator.kube.client import Api
from qlora_operator.kube.kopf_import import kopf
from qlora_operator.state.cache import ObjectCache

KEY = ("team", "job")
WRITES = 5
DEGRADED = Condition(type="Degraded", status="True", reason="Pending", last_transition_time=NOW, observed_generation=1)
WANTED = QLoRAJobStatus(reason="Unschedulable", total_restarts=1, conditions=[DEGRADED])
UNKNOWN = ["Unschedulable", "Degraded", "totalRestarts"]


class OlderServer:
    """Serves one QLoRAJob by a definition that does not have one reason, type of conditions or field of status."""

    def __init__(self, unknown):
        self.unknown, self.body = unknown, job().to_json_dict()

    async def patch(self, request):
        """Answer a merge patch of status."""
        change = (await request.json())["status"]
        refused = ["status.reason"] if change.get("reason") == self.unknown else []
        types = [c["type"] for c in change.get("conditions", ())]
        refused += [f"status.conditions[{i}].type" for i, kind in enumerate(types) if kind == self.unknown]
        if refused:
            message = f'{refused[0]}: Unsupported value: "{self.unknown}"'
            return web.json_response({"kind": "Status", "reason": "Invalid", "message": message}, status=422)
        self.store(change)
        return web.json_response(self.body)

    def store(self, change):
        """Store a change of status, of whichever program."""
        status = {**self.body.get("status", {}), **change}
        status.pop(self.unknown, None)
        if status != self.body.get("status"):
            meta = self.body["metadata"]
            meta = {**meta, "resourceVersion": str(int(meta["resourceVersion"]) + 1)}
            self.body = {**self.body, "metadata": meta, "status": status}


def written(server, write, *, between=lambda: None):
    """Return what repeated writes of a status return, and for how long they are held back.

    Args:
        server: answers the writes.
        write: makes one of them, by the writer, the job and its JSON as stored.
        between: what happens after each.

    """

    async def run():
        app = web.Application()
        app.router.add_patch("/apis/qlora.dev/v1alpha1/namespaces/team/qlorajobs/job/status", server.patch)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        api = Api(kopf.ConnectionInfo(server=f"http://127.0.0.1:{runner.addresses[0][1]}"), lambda *_: None)
        cache, held = ObjectCache(), []
        writer = StatusWriter(cache, api, 15, lambda _, seconds: held.append(seconds))
        results = []
        try:
            for _ in range(WRITES):
                cache.take_job(server.body)
                stored = cache[KEY].job
                results.append(await write(writer, stored.parse()[0], json.loads(stored.body)))
                between()
        finally:
            await api.close()
            await runner.cleanup()
        return results, held

    return asyncio.run(run())


def preparing(stages):
    """Return a write of a job that prepares; each call has the next stage."""

    def write(writer, parsed, stored):
        text = f"{next(stages)}: model and rows are checked"
        prepared = Condition(
            type="Prepared", status="False", reason="Preparing", last_transition_time=NOW, message=text
        )
        return writer.write(KEY, parsed, stored, Decision(QLoRAJobStatus(reason="Preparing", conditions=[prepared])))

    return write


def test_stages_of_prepare_are_written_once_they_last():
    server = OlderServer("nothing")
    results, held = written(server, preparing(iter("abcde")))
    assert results == [True] * WRITES
    assert server.body["status"]["conditions"][0]["message"].startswith("a: ")
    assert all(29 < seconds <= 30 for seconds in held)
    assert len(held) == WRITES - 1


def status(writer, parsed, stored):
    return writer.write(KEY, parsed, stored, Decision(WANTED))


def not_understood(writer, _, stored):
    return writer.write_unknown_fields(KEY, stored, ValueError("spec.later"))


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_a_status_of_which_an_older_definition_stores_less_is_not_taken_for_another_programs(unknown, caplog):
    server = OlderServer(unknown)
    assert written(server, status) == ([True] * WRITES, [])
    assert unknown not in json.dumps(server.body["status"])
    assert "another program" not in caplog.text


def test_a_condition_that_an_older_definition_refuses_is_not_taken_for_another_programs(caplog):
    assert written(OlderServer("Degraded"), not_understood)[1] == []
    assert "another program" not in caplog.text


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_what_another_program_writes_by_an_older_definition_is_noticed(unknown, caplog, monkeypatch):
    monkeypatch.setattr(repeated_writes, "FIRST_PAUSE_SECONDS", repeated_writes.LONGEST_PAUSE_SECONDS)
    server = OlderServer(unknown)
    results, held = written(server, status, between=lambda: server.store({"reason": "Queued", "conditions": []}))
    assert results == [True, True, False, False, False]
    assert len(held) == 3
    assert "another program replaces what this one writes" in caplog.text
