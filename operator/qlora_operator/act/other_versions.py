"""Keep what another version of the operator wrote into status, and write what an older definition takes."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from pydantic import BaseModel

from qlora_api.errors import field_types
from qlora_api.status import ConditionType, Reason
from qlora_operator.kube.client import Object

LONGEST_ERROR = 2000
"""Characters of an error that get into status."""
_KEYS = ("number", "type", "name")
"""By which entries of a list are the same ones."""
_REFUSED = re.compile(r"status\.conditions\[(\d+)\]\.(?:type|reason)")


def with_unknown_fields(stored: Object, written: Object, model: type[BaseModel]) -> Object:
    """Return a status with the fields of the stored one that this version's type does not have."""
    types = field_types(model)
    result = dict(written)
    for name, value in stored.items():
        kind = types.get(name)
        if name not in types:
            result[name] = value
        elif kind is not None and name in written:
            result[name] = _merged(value, written[name], kind)
    return result


def _merged(stored: Any, written: Any, kind: type[BaseModel]) -> Any:
    if isinstance(stored, dict) and isinstance(written, dict):
        return with_unknown_fields(stored, written, kind)
    if not (isinstance(stored, list) and isinstance(written, list)):
        return written
    before: dict[tuple[str, Any] | None, Object] = {key: entry for entry in stored if (key := _key(entry))}
    return [with_unknown_fields(before.get(_key(entry), {}), entry, kind) for entry in written]


def _key(entry: Object) -> tuple[str, Any] | None:
    return next(((name, entry[name]) for name in _KEYS if name in entry), None)


def for_older_definition(status: Object, message: str) -> Object:
    """Return a status without the conditions, and the reason, that an older definition's closed lists refuse."""
    refused = {int(index) for index in _REFUSED.findall(message)}
    kept = {**status}
    if refused:
        kept["conditions"] = [c for index, c in enumerate(status.get("conditions", ())) if index not in refused]
    if "status.reason: Unsupported value" in message:
        kept["reason"] = "Pending"
    return kept


def not_understood_message(what: str, error: Exception) -> str:
    """Return the message of a ``job`` or ``sweep`` that has a value unknown to this version."""
    return f"this version of the operator leaves the {what} unchanged: {error}"[:LONGEST_ERROR]


def is_not_understood(status: Object, message: str) -> bool:
    """Return whether a stored status says that its object is degraded, with this message."""
    written = {(c["type"], c["status"], c.get("message")) for c in status.get("conditions", ())}
    return (ConditionType.DEGRADED, "True", message) in written


def with_not_understood(stored: Object, message: str, now: datetime) -> list[Object]:
    """Return the conditions of a stored object, with one that says that it is not understood."""
    conditions = (stored.get("status") or {}).get("conditions", ())
    degraded = {
        "type": ConditionType.DEGRADED,
        "status": "True",
        "reason": Reason.NOT_UNDERSTOOD,
        "message": message,
        "lastTransitionTime": now.replace(microsecond=0).isoformat(),
        "observedGeneration": stored["metadata"].get("generation", 0),
    }
    return [*(c for c in conditions if c["type"] != ConditionType.DEGRADED), degraded]
