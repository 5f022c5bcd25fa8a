"""Builders of what the operator sees; a test names only what it is about."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from qlora_api.contract import TerminationMessage, reason_of
from qlora_api.job import QLoRAJob
from qlora_api.spec import Gang
from qlora_api.status import Attempt, QLoRAJobStatus
from qlora_operator.config import OperatorConfig
from qlora_operator.decide.decision import Decision
from qlora_operator.decide.plan import plan
from qlora_operator.state.observed import JobState, Observed, ObservedJob, PodSnapshot

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
UID = "11111111-2222-3333-4444-555555555555"
CONFIG = OperatorConfig.model_validate({"trainer": {"image": "trainer:1"}, "prepare": {"enabled": False}})
PREPARING = OperatorConfig.model_validate({"trainer": {"image": "trainer:1"}})

PREPARED = (
    '{"exitCode": 0, "reason": "Completed", "prepared": {"modelRevision": "r", "dataHash": "d", "trainRows": 1,'
    ' "trainTokens": 9, "trainSequences": 1, "gradientCheckpointing": true,'
    ' "batch": {"worldSize": 1, "microBatchSize": 2, "gradientAccumulationSteps": 8}}}'
)


def job(status: QLoRAJobStatus | None = None, workers: int = 1, *, deleted: bool = False, **groups: Any) -> QLoRAJob:
    spec: dict[str, Any] = {
        "model": {"source": "s3://models/base"},
        "dataset": {"train": {"source": "s3://data/rows.jsonl"}, "format": "Text"},
        "training": {"maxSteps": 10, "globalBatchSize": 16},
        "parallelism": {"workers": workers},
        "output": {"destination": "s3://adapters/job"},
    }
    for group, value in groups.items():
        spec[group] = {**spec.get(group, {}), **value} if isinstance(value, dict) else value
    metadata = {"name": "job", "namespace": "team", "uid": UID, "generation": 1, "resourceVersion": "7"}
    if deleted:
        metadata["deletionTimestamp"] = NOW.isoformat()
    built = QLoRAJob.from_manifest({"metadata": metadata, "spec": spec})
    return built.model_copy(update={"status": status})


def child(attempt: int = 1, state: JobState = JobState.ACTIVE, **more: Any) -> ObservedJob:
    values: dict[str, Any] = {
        "name": f"job-{attempt}",
        "uid": f"job-uid-{attempt}",
        "version": 1,
        "owner": UID,
        "ready": 0,
        "deleting": False,
        "message": "",
        "failed_reason": "",
        "created": NOW,
        "plan": json.dumps({"worldSize": 1, "microBatchSize": 4, "gradientAccumulationSteps": 4}),
        "ended": NOW if state in (JobState.COMPLETE, JobState.FAILED) else None,
    }
    return ObservedJob(attempt=attempt, state=state, **{**values, **more})


def pod(attempt: int = 1, index: int = 0, code: int | None = None, word: str | None = None, **more: Any) -> PodSnapshot:
    """``word``: the text of the termination message that goes with the exit code; None: it left none."""
    message = ""
    if word is not None and code is not None:
        message = TerminationMessage(exit_code=code, reason=reason_of(code), message=word).to_bytes().decode()
    values: dict[str, Any] = {
        "name": f"job-{attempt}-{index}",
        "uid": f"pod-{attempt}-{index}",
        "version": 1,
        "owner": UID,
        "node": f"node-{index}",
        "ip": "10.0.0.1",
        "ready": code is None,
        "trainer_ready": code is None and more.get("ready", True),
        "waiting": "",
        "waiting_message": "",
        "unschedulable": "",
        "disruption": "",
        "created": NOW,
        "message": message,
        "controller": f"job-uid-{attempt}",
        "phase": "Running" if code is None else "Succeeded" if code == 0 else "Failed",
    }
    return PodSnapshot(attempt=attempt, index=index, exit_code=code, **{**values, **more})


def observed(*things: ObservedJob | PodSnapshot, after: float = 0, **more: Any) -> Observed:
    """Return an observation with what is there, ``after`` seconds from the builders' now."""
    jobs = {j.attempt: j for j in things if isinstance(j, ObservedJob)}
    pods = tuple(p for p in things if isinstance(p, PodSnapshot))
    return Observed(now=NOW + timedelta(seconds=after), jobs=jobs, pods=pods, **more)


def decide(
    a_job: QLoRAJob, what_is_observed: Observed, config: OperatorConfig = CONFIG, gang: Gang = Gang.NONE
) -> Decision:
    return plan(a_job, what_is_observed, config, gang)


def running(*ended: str, **more: Any) -> QLoRAJobStatus:
    """Status with ended attempts, by reason, and an open one."""
    attempts = [attempt(n, reason) for n, reason in enumerate(ended, 1)]
    return QLoRAJobStatus(attempts=[*attempts, attempt(len(ended) + 1)], start_time=NOW, **more)


def attempt(number: int, reason: str | None = None, **more: Any) -> Attempt:
    values: dict[str, Any] = {
        "number": number,
        "worldSize": 1,
        "microBatchSize": 4,
        "gradientAccumulationSteps": 4,
        "startTime": NOW,
    }
    if reason:
        values |= {"endTime": NOW, "reason": reason, "lastStep": 5, "firstStep": 0}
    return Attempt.model_validate({**values, **more})


def held(*earlier: Attempt) -> QLoRAJobStatus:
    """Status with an attempt whose pods are ready since now."""
    return QLoRAJobStatus(attempts=[*earlier, attempt(len(earlier) + 1, runningTime=NOW)], start_time=NOW)


def names(planned: Decision) -> list[str]:
    """Names of what is made, without the job's key, which comes before every Job."""
    return [m["metadata"]["name"] for m in planned.create if m["kind"] != "Secret"]
