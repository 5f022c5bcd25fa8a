"""Keep what another version of the operator wrote into status, and write what an older definition takes."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from qlora_api.errors import field_types
from qlora_operator.kube.client import Object

_KEYS = ("number", "type")
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
    before = {_key(entry): entry for entry in stored}
    return [with_unknown_fields(before.get(_key(entry), {}), entry, kind) for entry in written]


def _key(entry: Object) -> tuple[str, Any] | None:
    return next(((name, entry[name]) for name in _KEYS if name in entry), None)


def for_older_definition(status: Object, said: str) -> Object:
    """Return a status without the conditions, and the reason, that an older definition's closed lists refuse."""
    refused = {int(index) for index in _REFUSED.findall(said)}
    kept = {**status}
    if refused:
        kept["conditions"] = [c for index, c in enumerate(status.get("conditions", ())) if index not in refused]
    if "status.reason: Unsupported value" in said:
        kept["reason"] = "Pending"
    return kept
