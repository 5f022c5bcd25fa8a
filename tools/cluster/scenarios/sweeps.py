"""QLoRASweeps for tests, and pods that play their trials: a trial's loss follows from its number."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from cluster.scenarios.jobs import GROUP
from cluster.scenarios.script import pods_do
from cluster.scenarios.whole_life import word

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cluster.api import ClusterApi, Object
    from cluster.scenarios.history import History
    from cluster.scenarios.proxy import Call

SWEEP = "search"
LOSSES = ("1.5", "1.2", "1.1", "1.4")
"""By number of the trial: the best is search-2."""
PAUSE, STEPS = 2, 10


def qlora_sweep(namespace: str, name: str = SWEEP, **spec: Any) -> Object:
    """A valid manifest: a grid of four, two at a time."""
    job = {
        "model": {"source": "s3://models/base"},
        "dataset": {"train": {"source": "s3://data/rows.jsonl"}, "eval": {"fraction": "0.1"}, "format": "Text"},
        "training": {"maxSteps": STEPS, "globalBatchSize": 16, "evaluation": {"everySteps": PAUSE}},
        "output": {"destination": "s3://adapters/search"},
    }
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRASweep",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "template": {"spec": job},
            "parameters": [
                {"path": "lora.rank", "choices": [8, 16]},
                {"path": "training.learningRate", "choices": ["1e-4", "3e-4"]},
            ],
            "algorithm": {"type": "Grid"},
            "maxTrials": 4,
            "parallelTrials": 2,
            **spec,
        },
    }


def sweep_path(namespace: str, name: str = SWEEP) -> str:
    return f"{GROUP}/namespaces/{namespace}/qlorasweeps/{name}"


def create_sweep(api: ClusterApi, manifest: Object) -> str:
    """Create it; its path."""
    api.create(manifest)
    return sweep_path(manifest["metadata"]["namespace"], manifest["metadata"]["name"])


def adapter(trial: str) -> dict[str, str]:
    folder = f"s3://adapters/search/trials/{trial}"
    return {"uri": f"{folder}/adapter", "manifestUri": f"{folder}/manifest.json", "manifestSha256": "a" * 64}


def succeeds(number: int) -> dict[str, object]:
    """Play the pod of a trial that trains to the end."""
    progress = {"step": STEPS, "totalSteps": STEPS, "bestEvalLoss": LOSSES[number]}
    said = word(adapter=adapter(f"{SWEEP}-{number}"), progress=progress)
    return {"run-seconds": "0", "exit-code": 0, "termination-message": said}


def pauses(number: int) -> dict[str, object]:
    """Play the pod of a trial that reaches the step of the first comparison."""
    progress = {"step": PAUSE, "totalSteps": STEPS, "bestEvalLoss": LOSSES[number]}
    said = word(43, "Paused", f"paused at step {PAUSE} of {STEPS}; a checkpoint is written", progress=progress)
    return {"run-seconds": "0", "exit-code": 43, "termination-message": said}


@contextmanager
def trials_succeed(api: ClusterApi, namespace: str, everywhere: Mapping[str, str] | None = None) -> Iterator[None]:
    """Have each trial of the grid train to its end in one attempt."""
    with ExitStack() as stack:
        for number in range(len(LOSSES)):
            does = succeeds(number)
            stack.enter_context(pods_do(api, namespace, does, job=f"{SWEEP}-{number}", everywhere=everywhere))
        yield


@contextmanager
def trials_pause_first(api: ClusterApi, namespace: str, everywhere: Mapping[str, str] | None = None) -> Iterator[None]:
    """Have each trial pause in its first attempt, and train to the end in its second one."""
    with ExitStack() as stack:
        for number in range(len(LOSSES)):
            where = {"job": f"{SWEEP}-{number}", "everywhere": everywhere}
            stack.enter_context(pods_do(api, namespace, pauses(number), attempt=1, **where))
            stack.enter_context(pods_do(api, namespace, succeeds(number), attempt=2, **where))
        yield


# --------------------------------------------------------------------------------------------------------- a whole life

LIFE_LABELS = {"test.qlora.dev/script": "whole-sweep"}
"""Labels of namespaces in which pods play the parts that this scenario needs."""
STEP_SECONDS = 60


def life(namespace: str) -> Object:
    """Two trials, one at a time, of which the better one goes on; deleted soon after its end."""
    return qlora_sweep(
        namespace,
        parameters=[{"path": "lora.rank", "choices": [8, 16]}],
        parallelTrials=1,
        maxTrials=2,
        earlyStopping={"minSteps": PAUSE, "reductionFactor": 2},
        ttlSecondsAfterFinished=2,
    )


@contextmanager
def trials_live(api: ClusterApi, namespace: str, everywhere: Mapping[str, str] = LIFE_LABELS) -> Iterator[None]:
    """Have the trials of this life pause; the better one, search-1, is then suspended as it trains, and succeeds."""
    stops = {"stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped at step 5")}
    with ExitStack() as stack:
        for does, job, attempt in (
            (pauses(0), "search-0", 1),
            (pauses(1), "search-1", 1),
            (stops, "search-1", 2),
            (succeeds(1), "search-1", 3),
        ):
            stack.enter_context(pods_do(api, namespace, does, job=job, attempt=attempt, everywhere=everywhere))
        yield


def live_sweep(api: ClusterApi, namespace: str) -> None:
    """Play the user: create, suspend as the better trial trains, resume; return when all is gone."""
    path = create_sweep(api, life(namespace))
    trial = f"{GROUP}/namespaces/{namespace}/qlorajobs/search-1"

    def trains_again(job: Object) -> bool:
        status = job.get("status", {})
        return status.get("state") == "Running" and len(status["attempts"]) == 2

    api.wait_for(trial, trains_again, seconds=STEP_SECONDS, what="the better trial goes on")
    api.patch(path, {"spec": {"suspend": True}})
    api.wait_for(path, lambda sweep: sweep["status"]["state"] == "Suspended", seconds=STEP_SECONDS, what="suspended")
    api.patch(path, {"spec": {"suspend": False}})
    api.wait_gone(path, seconds=STEP_SECONDS)
    jobs = f"{GROUP}/namespaces/{namespace}/qlorajobs"
    api.wait_for(jobs, lambda found: not found["items"], seconds=STEP_SECONDS, what="no trial is left")


def sweep_moment(call: Call) -> str:
    """Return what a call of the operator's for a sweep is for; empty if it is for a job, or only counts."""
    kind = f"{call.method} {call.resource}"
    if call.resource == "qlorasweeps/status":
        reason = call.body["status"].get("reason")
        return f"{kind} {reason}" if reason else ""
    if call.resource == "events":
        return f"{kind} {call.body['reason']}" if call.body["regarding"]["kind"] == "QLoRASweep" else ""
    return f"{kind} {call.name}" if call.resource in ("qlorajobs", "qlorasweeps") else ""


def sweep_outcome(history: History, namespace: str) -> dict[str, Any]:
    """Return what is left of a sweep in memory, without what differs from one life to the next."""
    status = history.of("qlorasweeps", namespace)[-1]["status"]
    of_trials = [v for v in history.of("qlorajobs", namespace) if v["metadata"]["name"].startswith(f"{SWEEP}-")]
    trials = {version["metadata"]["name"]: version for version in of_trials}
    return {
        "state": f"{status['state']} {status['reason']}",
        "conditions": {c["type"]: f"{c['status']} {c['reason']}" for c in status["conditions"]},
        "best": status["best"]["name"],
        "trials": status["trials"],
        "attempts": {name: [a["reason"] for a in t["status"]["attempts"]] for name, t in trials.items()},
        "made": len({version["metadata"]["uid"] for version in of_trials}),
    }


EXPECTED: dict[str, Any] = {
    "state": "Succeeded Completed",
    "conditions": {
        "Running": "False Completed",
        "Ready": "True Completed",
        "Suspended": "False Searching",
        "Succeeded": "True Completed",
        "Finished": "True Completed",
    },
    "best": "search-1",
    "trials": {"total": 2, "created": 2, "running": 0, "suspended": 1, "succeeded": 1, "failed": 0},
    "attempts": {"search-0": ["Paused"], "search-1": ["Paused", "Suspended", "Completed"]},
    "made": 2,
}
"""Outcome of this life, whatever befalls the operator."""
