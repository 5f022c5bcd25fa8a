"""Set conditions, as in the Kubernetes API conventions, and the texts of ``kubectl get``. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from qlora_api.status import Condition, ConditionType, MemoryComponent, QLoRAJobStatus, Reason
from qlora_operator.decide.decision import Context

GIBIBYTE = 1024**3


def set_condition(
    conditions: Iterable[Condition],
    kind: ConditionType,
    reason: Reason,
    message: str,
    *,
    is_true: bool,
    now: datetime,
    generation: int,
) -> list[Condition]:
    """Return the conditions with one of them set; its transition time moves only when its status does."""
    status: Literal["True", "False"] = "True" if is_true else "False"
    before = list(conditions)
    place = next((i for i, c in enumerate(before) if c.type is kind), None)
    old = before[place] if place is not None else None
    new = Condition(
        type=kind,
        status=status,
        reason=reason,
        message=message[:4096],
        last_transition_time=old.last_transition_time if old and old.status == status else now,
        observed_generation=generation,
    )
    if place is None:
        return [*before, new]
    return [*before[:place], new, *before[place + 1 :]]


def with_condition(
    context: Context, status: QLoRAJobStatus, kind: ConditionType, reason: Reason, text: str, *, is_true: bool
) -> QLoRAJobStatus:
    """Return the status with one condition set, now and of the job's generation."""
    generation = context.job.metadata.generation or 0
    conditions = set_condition(
        status.conditions, kind, reason, text, is_true=is_true, now=context.now, generation=generation
    )
    return status.model_copy(update={"conditions": conditions})


_STATE_CONDITIONS = (
    *(ConditionType.SUCCEEDED, ConditionType.FAILED, ConditionType.SUSPENDED),
    *(ConditionType.RUNNING, ConditionType.PREPARED),
)


def with_summary(context: Context, status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Return the status with the conditions that say the same in other tools' terms, and with what has no effect."""
    text = reason_message(status)
    succeeded = is_condition_true(status.conditions, ConditionType.SUCCEEDED)
    status = with_condition(context, status, ConditionType.READY, status.reason, text, is_true=succeeded)
    if is_finished(status):
        status = with_condition(context, status, ConditionType.FINISHED, status.reason, text, is_true=True)
    if is_finished(status) and not succeeded:
        status = with_condition(context, status, ConditionType.STALLED, status.reason, text, is_true=True)
    if unknown := context.observed.unknown_fields:
        text = unknown_fields_message(unknown)
        return with_condition(context, status, ConditionType.DEGRADED, Reason.NOT_UNDERSTOOD, text, is_true=True)
    if is_condition_true(status.conditions, ConditionType.DEGRADED):
        return with_condition(context, status, ConditionType.DEGRADED, Reason.UNDERSTOOD, "", is_true=False)
    return status


def unknown_fields_message(paths: Iterable[str]) -> str:
    """Return the message of an object that has fields unknown to this version."""
    return f"unknown to this version of the operator, and ignored: {', '.join(paths)}"


def reason_message(status: QLoRAJobStatus) -> str:
    """Return the message of the condition that has the status's reason; empty: none has."""
    by_type = {c.type: c for c in status.conditions}
    own = [by_type[kind] for kind in _STATE_CONDITIONS if kind in by_type]
    return next((c.message for c in own if c.reason is status.reason), "")


def is_condition_true(conditions: Iterable[Condition], kind: ConditionType) -> bool:
    return any(c.type is kind and c.status == "True" for c in conditions)


def is_finished(status: QLoRAJobStatus) -> bool:
    """Return whether a job has succeeded or failed."""
    return is_condition_true(status.conditions, ConditionType.SUCCEEDED) or is_condition_true(
        status.conditions, ConditionType.FAILED
    )


def time_in_words(seconds: int | None) -> str:
    """As kubectl writes ages: 45s, 12m, 3h20m, 2d4h."""
    if seconds is None:
        return ""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24}h"
    if hours:
        return f"{hours}h{minutes % 60}m"
    return f"{minutes}m" if minutes else f"{seconds}s"


def memory_in_words(measured: dict[str, int]) -> str:
    """Return the measured peak, or nothing yet."""
    peak = measured.get(MemoryComponent.PEAK.value)
    return "" if peak is None else f"{peak / GIBIBYTE:.1f}Gi"
