"""A user's errors, in words: field, value, what is allowed."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qlora_api.base import RuleBrokenError

T = TypeVar("T", bound=BaseModel)


class FieldError(ValueError):
    """One error at one field of a manifest.

    ``str()`` reads ``spec.lora.rank: 0 must be at least 1``. Texts are shown in quotes, numbers as they are.

    Args:
        field: path in the manifest. Empty: the manifest as a whole.
        value: what stands there.
        allowed: what may stand there; completes the sentence that the value begins.
        sentence: what to say of the field instead of value and ``allowed``.

    """

    def __init__(self, field: str, value: object, allowed: str, *, sentence: str | None = None) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        shown = _show(value)
        text = sentence or (f"{shown} {allowed}" if shown else allowed)
        super().__init__(f"{field}: {text}" if field else text)


class ManifestError(ValueError):
    """All errors of one manifest."""

    def __init__(self, errors: list[FieldError]) -> None:
        self.errors = errors
        super().__init__("\n".join(str(m) for m in errors))


def validate(model: type[T], value: Any) -> T:
    """Build ``model`` from parsed YAML or JSON.

    Raises:
        ManifestError: names every field that is wrong.

    """
    try:
        # Through JSON and strictly: what the API server would refuse ("3" for 3, max_steps) is refused here too.
        return model.model_validate_json(json.dumps(value, default=str), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise ManifestError([_error(model, e) for e in error.errors()]) from None


def _show(value: object) -> str:
    if value is None or isinstance(value, (dict, list, BaseModel)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else f'"{value}"'


def _error(model: type[BaseModel], error: ErrorDetails) -> FieldError:
    field = _path(error["loc"])
    context: dict[str, Any] = error.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, RuleBrokenError):
        shown = _show(cause.value)
        sentence = f"{shown}: {cause}" if shown else None
        return FieldError(f"{field}.{cause.field}".strip("."), cause.value, str(cause), sentence=sentence)
    if isinstance(cause, ValueError):
        return FieldError(field, error["input"], str(cause))
    allowed = _allowed(model, error, context)
    unknown = error["type"] == "extra_forbidden"
    return FieldError(field, error["input"], allowed, sentence=allowed if unknown else None)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.strip(".")


def _allowed(model: type[BaseModel], error: ErrorDetails, context: dict[str, Any]) -> str:
    match error["type"]:
        case "missing":
            return "is required"
        case "extra_forbidden":
            return _unknown_field(model, error["loc"])
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "enum" | "literal_error":
            return _unknown_value(error["input"], context["expected"].replace("'", ""))
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
        case "int_type" | "int_parsing" | "int_from_float":
            return "must be a whole number, without quotes and without a unit"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "string_type":
            return "must be a text"
        case "model_type" | "dict_type":
            return "must be a group of fields"
        case _:
            return f"is not allowed: {error['msg'][0].lower()}{error['msg'][1:]}"


def _unknown_field(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    group: type[BaseModel] | None = model
    for part in location[:-1]:
        if isinstance(part, str) and group is not None:
            group = field_types(group).get(part)
    if group is None:
        return "unknown field"
    known = sorted(fields_of(group))
    close = closest(str(location[-1]), known)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"unknown field{hint} Fields here: {', '.join(known)}"


def _unknown_value(value: object, expected: str) -> str:
    """``expected`` reads ``NF4, FP4, INT8 or None``."""
    known = re.split(r", | or ", expected)
    if len(known) == 1:
        return f"must be {expected}"
    close = closest(value, known) if isinstance(value, str) else []
    return f"must be one of {expected}" + (f"; did you mean {close[0]}?" if close else "")


def closest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Return the known names that resemble ``name`` most, best first, whatever their case."""
    by_lower_case = {each.lower(): each for each in known}
    return [by_lower_case[each] for each in difflib.get_close_matches(name.lower(), by_lower_case, n=count)]


@cache
def fields_of(model: type[BaseModel]) -> Mapping[str, FieldInfo]:
    """Return the fields of a group by their JSON names."""
    return MappingProxyType({field.alias or name: field for name, field in model.model_fields.items()})


@cache
def field_types(model: type[BaseModel]) -> Mapping[str, type[BaseModel] | None]:
    """Return the type of each field that is a group or a list of groups, and None for the others, by JSON names."""
    return MappingProxyType({name: _model_of(field.annotation) for name, field in fields_of(model).items()})


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic type ``X`` of ``X``, ``X | None`` or ``list[X]``; None where there is none."""
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
