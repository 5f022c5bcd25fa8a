"""A job's life with every kind of call in it that an operator makes.

Prepare, an attempt that runs out of memory, one that is suspended, one that succeeds, and the end by its time to live.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from cluster.scenarios.jobs import create_job, in_state, qlora_job
from cluster.scenarios.script import pods_do
from qlora_operator.decide.prepare_result import GPU_NOT_KNOWN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.api import ClusterApi, Object
    from cluster.scenarios.history import History
    from cluster.scenarios.proxy import Call

NAMESPACE_LABELS = {"test.qlora.dev/script": "whole-life"}
"""Labels of namespaces in which pods play the parts that this scenario needs."""
SETTINGS = {"prepare": {"enabled": True}}
"""Settings of the operator."""
WORKERS = 2
STEP_SECONDS = 60
ADAPTER = {
    "uri": "s3://adapters/job/3f2a-attempt-1/adapter",
    "manifestUri": "s3://adapters/job/manifest.json",
    "manifestSha256": "a" * 64,
}
PREPARED = {
    "modelRevision": "abc",
    "dataHash": "d",
    "trainRows": 7,
    "trainTokens": 99,
    "trainSequences": 3,
    "batch": {"worldSize": WORKERS, "microBatchSize": 4, "gradientAccumulationSteps": 2},
    "gradientCheckpointing": True,
    "memory": {"quantizedWeights": 4_000_000_000},
}


def word(code: int = 0, reason: str = "Completed", message: str = "step 10 of 10", **more: object) -> str:
    """A trainer's termination message."""
    said = {"exitCode": code, "reason": reason, "message": message, "progress": {"step": 10, "totalSteps": 10}}
    return json.dumps({**said, **more})


def ends(code: int = 0, reason: str = "Completed", message: str = "step 10 of 10", **more: object) -> dict[str, object]:
    """Play pods that end at once: before the Job controller counts them as ready."""
    return {"run-seconds": "0", "exit-code": code, "termination-message": word(code, reason, message, **more)}


@contextmanager
def pods_live(api: ClusterApi, namespace: str) -> Iterator[None]:
    """Have pods play this life in all namespaces with the labels, of which ``namespace`` is one."""
    stops = {"stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped at step 5")}
    with ExitStack() as stack:
        for does, where in (
            (ends(prepared=PREPARED), {"component": "prepare"}),
            (ends(41, "OutOfDeviceMemory", "at step 3"), {"attempt": 1}),
            (stops, {"attempt": 2}),
            (ends(adapter=ADAPTER), {"attempt": 3}),
        ):
            stack.enter_context(pods_do(api, namespace, does, everywhere=NAMESPACE_LABELS, **where))
        yield


def live(api: ClusterApi, namespace: str) -> None:
    """Play the user: create, suspend the second attempt as it trains, resume; return when all is gone."""
    finish_life(api, namespace, start_life(api, namespace))


def start_life(api: ClusterApi, namespace: str) -> str:
    """Create the job and return its path as its second attempt trains."""
    path = create_job(api, qlora_job(namespace=namespace, workers=WORKERS, policy={"ttlSecondsAfterFinished": 2}))

    def trains_again(job: Object) -> bool:
        return in_state("Running")(job) and len(job["status"]["attempts"]) == 2

    api.wait_for(path, trains_again, seconds=STEP_SECONDS, what="the second attempt trains")
    return path


def finish_life(api: ClusterApi, namespace: str, path: str) -> None:
    """Suspend the attempt, resume, and return when all is gone."""
    api.patch(path, {"spec": {"suspend": True}})
    api.wait_for(path, in_state("Suspended"), seconds=STEP_SECONDS, what="suspended")
    api.patch(path, {"spec": {"suspend": False}})
    api.wait_gone(path, seconds=STEP_SECONDS)
    for kind in ("/apis/batch/v1/namespaces/{}/jobs", "/api/v1/namespaces/{}/pods", "/api/v1/namespaces/{}/services"):
        place = kind.format(namespace)
        api.wait_for(place, lambda found: not found["items"], seconds=STEP_SECONDS, what=f"nothing left in {place}")


UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def moment(call: Call) -> str:
    """Return what a call of the operator's is for, in the same words in every life; empty if it only adds text.

    "1 of 2 pods are ready" is written or not as it happens, and nothing depends on it.
    """
    kind = f"{call.method} {call.resource}"
    if call.resource == "qlorajobs/status":
        status = call.body["status"]
        attempts = status.get("attempts", ())
        newest = f"attempt {attempts[-1]['number']}" if attempts else ""
        if not {"attempts", "reason", "prepared", "adapter"} & set(status):
            return ""
        return " ".join(filter(None, (kind, status.get("reason"), newest)))
    return f"{kind} {call.body['reason'] if call.resource == 'events' else UID.sub('UID', call.name)}"


def outcome(history: History, namespace: str) -> dict[str, Any]:
    """Return what is left of a life in memory, without what differs from one to the next: times, nodes, UIDs."""
    status = history.of("qlorajobs", namespace)[-1]["status"]
    return {
        "state": f"{status['state']} {status['reason']}",
        "attempts": [
            f"{a['number']} {a.get('reason')} {a['microBatchSize']} × {a['gradientAccumulationSteps']}"
            for a in status["attempts"]
        ],
        "termination messages": [a["message"] for a in status["attempts"] if a.get("reason") != "Suspended"],
        "conditions": {c["type"]: f"{c['status']} {c['reason']} {c['message']}" for c in status["conditions"]},
        "restarts": status["restarts"],
        "adapter": status["adapter"],
        "rows": status["prepared"]["trainRows"],
        "memory": status["memory"],
        "steps": status["progress"]["step"],
        "jobs made": made(history, "jobs", namespace),
        "pods made": made(history, "pods", namespace),
    }


EXPECTED: dict[str, Any] = {
    "state": "Succeeded Completed",
    "attempts": ["1 OutOfDeviceMemory 4 × 2", "2 Suspended 2 × 4", "3 Completed 2 × 4"],
    "termination messages": ["at step 3", "step 10 of 10"],
    "conditions": {
        "Prepared": f"True Prepared 7 rows, 99 tokens, model revision abc, {GPU_NOT_KNOWN}",
        "Running": "False Completed ",
        "Suspended": "False Pending resumed",
        "Succeeded": "True Completed step 10 of 10",
        "Ready": "True Completed step 10 of 10",
        "Finished": "True Completed step 10 of 10",
    },
    "restarts": 0,
    "adapter": ADAPTER,
    "rows": 7,
    "memory": {"measured": {}, "predicted": PREPARED["memory"]},
    "steps": 10,
    "jobs made": {"prepare": 1, "1": 1, "2": 1, "3": 1},
    "pods made": {"prepare": 1, "1": WORKERS, "2": WORKERS, "3": WORKERS},
}
"""Outcome of this life, whatever befalls the operator."""


def made(history: History, plural: str, namespace: str) -> dict[str, int]:
    """Count the Jobs, or pods, that were made for each attempt."""
    versions = history.of(plural, namespace)
    attempt_of = {v["metadata"]["uid"]: v["metadata"]["labels"].get("qlora.dev/attempt", "prepare") for v in versions}
    return dict(Counter(attempt_of.values()))


def contradictions(history: History, namespace: str) -> list[str]:
    """Return where status took back what it had said: the course of a life, version by version."""
    found: list[str] = []
    ended: dict[int, Object] = {}
    over = ""
    for version in history.of("qlorajobs", namespace):
        status = version.get("status", {})
        attempts = status.get("attempts", [])
        numbers = [a["number"] for a in attempts]
        if numbers != list(range(1, len(numbers) + 1)):
            found.append(f"attempts numbered {numbers}")
        if len(numbers) < len(ended):
            found.append(f"attempts {sorted(ended)} became {numbers}")
        for attempt in attempts:
            before = ended.get(attempt["number"])
            if before and attempt != before:
                found.append(f"attempt that had ended changed from {before} to {attempt}")
            if "endTime" in attempt:
                ended[attempt["number"]] = attempt
        if over and status.get("state") != over:
            found.append(f"{over} became {status.get('state')}")
        over = status["state"] if status.get("state") in ("Succeeded", "Failed") else over
    return found
