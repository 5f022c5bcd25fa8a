"""Events that people see with ``kubectl describe``. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from qlora_api.job import GROUP, QLoRAJob
from qlora_operator.decide.decision import Note
from qlora_operator.names import FIELD_MANAGER

LONGEST_NOTE = 1024
"""Characters that events.k8s.io/v1 takes."""


def event_of(job: QLoRAJob, note: Note, now: datetime) -> dict[str, Any]:
    """The Event that says a note of a job."""
    meta = job.metadata
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{meta.name}-", "namespace": meta.namespace},
        "eventTime": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "type": note.kind,
        "reason": note.reason,
        "action": "Reconcile",
        "note": note.message[:LONGEST_NOTE],
        "regarding": {
            "apiVersion": job.api_version,
            "kind": job.kind,
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
        },
        "reportingController": f"{GROUP}/operator",
        "reportingInstance": FIELD_MANAGER,
    }
