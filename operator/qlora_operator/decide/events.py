"""Events that people see with ``kubectl describe``. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from qlora_api.job import GROUP, QLoRAJob
from qlora_api.status import Attempt, ConditionType, QLoRAJobStatus, Reason
from qlora_api.sweep.sweep import QLoRASweep
from qlora_operator.decide.conditions import is_condition_true, reason_message
from qlora_operator.decide.decision import Note
from qlora_operator.decide.micro_time import micro_time
from qlora_operator.names import FIELD_MANAGER

LONGEST_NOTE = 1024
"""Characters that events.k8s.io/v1 takes."""


def transitions(before: QLoRAJobStatus, after: QLoRAJobStatus) -> Iterator[Note]:
    """Give what has happened to a job from one status to the next, but for the ends of attempts."""
    prepared = next((c for c in after.conditions if c.type is ConditionType.PREPARED and c.status == "True"), None)
    if prepared and not is_condition_true(before.conditions, ConditionType.PREPARED):
        yield Note("Normal", "Prepared", prepared.message)
    if before.reason is not Reason.QUEUED and after.reason is Reason.QUEUED:
        yield Note("Normal", "Queued", reason_message(after))
    if before.reason is Reason.QUEUED and after.reason in _ADMITTED:
        what = f"attempt {after.attempts[-1].number}" if after.attempts else "Prepare"
        yield Note("Normal", "Admitted", f"{what} was admitted")
    yield from _of_tracking(before, after)
    was, now = _newest(before), _newest(after)
    if now is None or now.end_time is not None:
        return
    ran = was is not None and was.number == now.number and was.running_time is not None
    if now.running_time is not None and not ran:
        yield _started(after, now)
    if now.running_time is None and ran:
        yield Note("Warning", "Requeued", f"attempt {now.number}: its queue reclaimed its GPUs")


def _of_tracking(before: QLoRAJobStatus, after: QLoRAJobStatus) -> Iterator[Note]:
    """Yield an Event for each tracking tool that fell behind or caught up; compared by type, as messages may change."""
    lagged = {run.type for run in before.tracking if run.message}
    for run in after.tracking:
        if run.message and run.type not in lagged:
            yield Note("Warning", "TrackingBehind", f"{run.type} does not have the newest steps: {run.message}")
        if not run.message and run.type in lagged:
            yield Note("Normal", "TrackingRecovered", f"{run.type} has all steps: {run.url}")


_ADMITTED = (Reason.STARTING, Reason.UNSCHEDULABLE, Reason.PREPARING, Reason.TRAINING, Reason.IMAGE_UNAVAILABLE)
"""Reasons of a job that has left its queue."""


def ranks(count: int) -> str:
    """``1 rank``, ``8 ranks``."""
    return f"{count} rank" if count == 1 else f"{count} ranks"


def _started(status: QLoRAJobStatus, attempt: Attempt) -> Note:
    text = f"attempt {attempt.number} trains: {ranks(attempt.world_size)} on {attempt.node or 'their nodes'}"
    last = status.attempts[-2] if len(status.attempts) > 1 else None
    if last is None:
        return Note("Normal", "Started", text)
    kind = "Resumed" if last.reason in (Reason.SUSPENDED, Reason.PAUSED) else "Recovered"
    return Note("Normal", kind, f"{text}; attempt {last.number} ended: {last.reason}")


def _newest(status: QLoRAJobStatus) -> Attempt | None:
    return status.attempts[-1] if status.attempts else None


def event_of(regarding: QLoRAJob | QLoRASweep, note: Note, now: datetime) -> dict[str, Any]:
    """Return the Event that says a note of a job or sweep."""
    meta = regarding.metadata
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{meta.name}-", "namespace": meta.namespace},
        "eventTime": micro_time(now),
        "type": note.kind,
        "reason": note.reason,
        "action": "Reconcile",
        "note": note.message[:LONGEST_NOTE],
        "regarding": {
            "apiVersion": regarding.api_version,
            "kind": regarding.kind,
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
        },
        "reportingController": f"{GROUP}/operator",
        "reportingInstance": FIELD_MANAGER,
    }
