"""Render the QLoRAJobs of a sweep's trials. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_api.job import API_VERSION, KIND
from qlora_api.sweep.sweep import SWEEP_KIND, QLoRASweep
from qlora_api.sweep.trials import TRIALS_FOLDER, trial_name, trial_spec
from qlora_operator.names import KUEUE_PRIORITY_LABEL, MANAGED_BY, SWEEP_LABEL


def trial_job(sweep: QLoRASweep, number: int, values: Mapping[str, Any], pause_at_step: int | None) -> dict[str, Any]:
    """Return the QLoRAJob of a trial, which the sweep controls: with it, the trial is deleted."""
    name = trial_name(sweep.metadata.name, number)
    spec = trial_spec(sweep.spec, name, values).to_json_dict()
    if pause_at_step is not None:
        spec["policy"]["pauseAtStep"] = pause_at_step
    priority = sweep.metadata.labels.get(KUEUE_PRIORITY_LABEL)
    labels = MANAGED_BY | {SWEEP_LABEL: sweep.metadata.name}
    owner = {
        "apiVersion": API_VERSION,
        "kind": SWEEP_KIND,
        "name": sweep.metadata.name,
        "uid": sweep.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": name,
            "namespace": sweep.metadata.namespace,
            "labels": labels | ({KUEUE_PRIORITY_LABEL: priority} if priority else {}),
            "ownerReferences": [owner],
        },
        "spec": spec,
    }


def shared_destination(name: str, labels: Mapping[str, str], destination: str) -> str:
    """Return the folder in which a job shares what it prepares: the sweep's of a trial, else the job's own."""
    folder = destination.rstrip("/")
    return folder.removesuffix(f"/{TRIALS_FOLDER}/{name}") if SWEEP_LABEL in labels else folder
