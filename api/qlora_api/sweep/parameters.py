"""Fields of a job that a sweep may vary, and their values."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema
from pydantic.fields import FieldInfo

from qlora_api.base import DECIMAL_PATTERN, Model, Rule, decimal
from qlora_api.errors import closest, field_types, fields_of
from qlora_api.spec import QLoRAJobSpec

VARIABLE_GROUPS = ("quantization", "lora", "training")
"""Groups of spec whose fields may vary. The others name inputs, outputs and hardware: trials that differ in these
cannot be compared, or would prepare their rows anew."""
MAX_CHOICES = 64
LARGEST_NUMBER = 1e12


class ValueKind(StrEnum):
    """Kind of a field's values."""

    INTEGER = "Integer"
    DECIMAL = "Decimal"
    OTHER = "Other"
    """Names, booleans and lists: values without an order."""


def _kind(field: FieldInfo) -> ValueKind:
    if field.annotation is int or int in get_args(field.annotation):
        return ValueKind.INTEGER
    schemas = (each.json_schema for each in field.metadata if isinstance(each, WithJsonSchema))
    return ValueKind.DECIMAL if any(s and s.get("pattern") == DECIMAL_PATTERN for s in schemas) else ValueKind.OTHER


def _variable_fields() -> dict[str, ValueKind]:
    types = {group: field_types(QLoRAJobSpec)[group] for group in VARIABLE_GROUPS}
    return {
        f"{group}.{name}": _kind(field)
        for group, kind in types.items()
        if kind is not None
        for name, field in fields_of(kind).items()
        if field_types(kind)[name] is None
    }


VARIABLE_FIELDS = _variable_fields()
"""Path below spec → kind of its values."""


def _check_path(path: str) -> str:
    if path in VARIABLE_FIELDS:
        return path
    close = closest(path.removeprefix("spec."), VARIABLE_FIELDS)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"must be the path of a field of {', '.join(VARIABLE_GROUPS[:-1])} or {VARIABLE_GROUPS[-1]}{hint}")


VariablePath = Annotated[
    str, AfterValidator(_check_path), WithJsonSchema({"type": "string", "enum": sorted(VARIABLE_FIELDS)})
]


class Scale(StrEnum):
    LINEAR = "Linear"
    LOG = "Log"


class Range(Model):
    """Numbers between two bounds, both included."""

    min: decimal(0, LARGEST_NUMBER)  # type: ignore[valid-type]
    """Lowest value, a quoted number such as "1e-5"."""
    max: decimal(0, LARGEST_NUMBER)  # type: ignore[valid-type]
    """Highest value, a quoted number such as "1e-3"."""
    scale: Scale = Scale.LINEAR
    """Log: values are drawn evenly on a logarithmic scale, as fits a learning rate."""
    rules: ClassVar = (
        Rule(
            "double(self.min) < double(self.max)",
            "min must be less than max",
            "min",
            lambda r: float(r.min) < float(r.max),
        ),
        Rule(
            "self.scale != 'Log' || double(self.min) > 0.0",
            "scale Log needs a min greater than 0",
            "min",
            lambda r: r.scale is not Scale.LOG or float(r.min) > 0,
        ),
    )


class Parameter(Model):
    """One field of the template's spec that varies over the trials."""

    model_config = ConfigDict(
        # CEL does not see choices, whose items may be of any type.
        json_schema_extra={"oneOf": [{"required": ["choices"]}, {"required": ["range"]}]}
    )
    path: VariablePath
    """Path below spec, such as lora.rank or training.learningRate."""
    choices: list[Any] | None = Field(
        None,
        min_length=1,
        max_length=MAX_CHOICES,
        json_schema_extra={"items": {"x-kubernetes-preserve-unknown-fields": True}},
    )
    """Values to choose from, written as in the field itself: [8, 16, 32], ["1e-4", "3e-4"], [NF4, INT8]."""
    range: Range | None = None
    """Numbers between two bounds. For a field of whole numbers, only whole numbers are drawn."""
    rules: ClassVar = (
        Rule(
            "",
            "set exactly one of choices and range",
            "choices",
            lambda p: (p.choices is None) != (p.range is None),
        ),
    )

    @property
    def kind(self) -> ValueKind:
        return VARIABLE_FIELDS[self.path]

    @property
    def texts(self) -> list[str]:
        """The choices as trials record them."""
        return [text_of(choice) for choice in self.choices or ()]

    @property
    def bounds(self) -> list[Any]:
        """The choices, or the ends of the range, as values of the field."""
        if self.choices is not None:
            return self.choices
        assert self.range is not None
        return [self.value_of(float(self.range.min)), self.value_of(float(self.range.max))]

    def comparable(self, value: Any) -> float | str:
        """Return what equal values of the field have in common: a decimal may be written in several ways."""
        text = text_of(value)
        is_number = self.kind is ValueKind.DECIMAL and re.fullmatch(DECIMAL_PATTERN, text)
        return float(text) if is_number else text

    def value_of(self, number: float) -> int | str:
        """Return a number of the range as a value of the field; decimals keep four digits, within the range."""
        assert self.range is not None
        if self.kind is ValueKind.INTEGER:
            return round(number)
        lowest, highest = self.range.min, self.range.max
        rounded = float(f"{number:.4g}")
        if rounded <= float(lowest):
            return str(lowest)
        return str(highest) if rounded >= float(highest) else f"{rounded:.4g}"


def text_of(value: Any) -> str:
    """Return a value as a person reads it, and as a trial records it."""
    return value if isinstance(value, str) else json.dumps(value)
