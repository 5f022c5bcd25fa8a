"""Keep what another version of the operator wrote into status, and write what an older definition takes."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from pydantic import BaseModel

from qlora_api.errors import model_of
from qlora_operator.kube.client import Object

_KEYS = ("number", "type")
"""By which entries of a list are the same ones."""
_REFUSED = re.compile(r"status\.conditions\[(\d+)\]\.(?:type|reason)")


def with_unknown_fields(stored: Object, written: Object, model: type[BaseModel]) -> Object:
    """Return a status with the fields of the stored one that this version's type does not have."""
    types = _types_by_name(model)
    result = dict(written)
    for name, value in stored.items():
        kind = types.get(name)
        if name not in types:
            result[name] = value
        elif isinstance(kind, type) and issubclass(kind, BaseModel) and name in written:
            result[name] = _merged(value, written[name], kind)
    return result


@cache
def _types_by_name(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: model_of(field.annotation) for name, field in model.model_fields.items()}


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
