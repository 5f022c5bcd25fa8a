"""Builders of sweeps and of the QLoRAJobs of their trials."""

from __future__ import annotations

from typing import Any

from operator_builders import NOW
from qlora_api.job import QLoRAJob
from qlora_api.sweep.sweep import QLoRASweep
from qlora_operator.decide.sweeps.trial_state import observe_trial

UID = "99999999-2222-3333-4444-555555555555"
RATES = ["1e-4", "3e-4"]


def sweep(**spec: Any) -> QLoRASweep:
    job = {
        "model": {"source": "s3://models/base"},
        "dataset": {"train": {"source": "s3://data/rows.jsonl"}, "eval": {"fraction": "0.1"}, "format": "Text"},
        "training": {"maxSteps": 10, "globalBatchSize": 16, "evaluation": {"everySteps": 2}},
        "output": {"destination": "s3://adapters/search/"},
    }
    whole = {
        "template": {"spec": job},
        "parameters": [{"path": "lora.rank", "choices": [8]}, {"path": "training.learningRate", "choices": RATES}],
        "algorithm": {"type": "Grid"},
        "maxTrials": 2,
        "parallelTrials": 2,
        **spec,
    }
    metadata = {"name": "search", "namespace": "team", "uid": UID, "generation": 1, "resourceVersion": "5"}
    return QLoRASweep.from_manifest(
        {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRASweep", "metadata": metadata, "spec": whole}
    )


def trial_job(number: int = 0, generation: int = 1, policy: dict[str, Any] | None = None, **status: Any) -> QLoRAJob:
    """The QLoRAJob of a trial, observed in its newest generation where status says nothing else."""
    spec = sweep().spec.template.spec.to_json_dict()
    spec |= {"policy": policy or {}, "suspend": status.pop("suspend", False)}
    spec["training"] = {**spec["training"], "learningRate": RATES[number]}
    spec["lora"] = {**spec["lora"], "rank": 8}
    metadata = {"name": f"search-{number}", "namespace": "team", "uid": f"u{number}", "generation": generation}
    metadata["resourceVersion"] = "7"
    return QLoRAJob.model_validate(
        {"metadata": metadata, "spec": spec, "status": {"observedGeneration": generation, **status}}
    )


def says(kind: str, reason: str, message: str = "") -> dict[str, Any]:
    """A condition that is true."""
    return {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": NOW}


def attempt(reason: str | None = None, **more: Any) -> dict[str, Any]:
    values = {"number": 1, "worldSize": 2, "microBatchSize": 4, "gradientAccumulationSteps": 2, "startTime": NOW}
    return {**values, **({"reason": reason, "endTime": NOW} if reason else {}), **more}


def observed(*jobs: QLoRAJob, now=NOW):
    """Return trials by number, as the reconciler sees them."""
    spec = sweep().spec
    numbers = ((int(job.metadata.name.rpartition("-")[2]), job) for job in jobs)
    return {number: observe_trial(number, job, spec, now) for number, job in numbers}
