"""Building blocks of every API type: the frozen model, decimal strings, and rules that hold in Python and in CEL."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, WithJsonSchema, model_validator
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """One cross-field rule, written twice: for the API server in CEL, for everyone else in Python.

    The two must agree; ``tests/api`` evaluates both on the same values.
    """

    cel: str
    """Empty: the schema says it in another way, as CEL cannot see the fields."""
    message: str
    """Says what is allowed, names the fields. Shown as it is by the API server and by ``qlora validate``."""
    field: str
    """Path of the field to change, relative to the type that carries the rule."""
    holds: Callable[[Any], bool]


def each_once(field: str, key: str, message: str, *, may_be_absent: bool = False) -> Rule:
    """Return the rule that no two items of a list have the same value of one field."""
    cel = f"self.{field}.all(a, self.{field}.exists_one(b, a.{key} == b.{key}))"
    return Rule(
        f"!has(self.{field}) || {cel}" if may_be_absent else cel,
        message,
        field,
        lambda m: len({getattr(item, key) for item in getattr(m, field)}) == len(getattr(m, field)),
    )


class RuleBrokenError(ValueError):
    """A cross-field rule that does not hold; carries the field to change."""

    def __init__(self, rule: Rule, value: object) -> None:
        super().__init__(rule.message)
        self.field = rule.field
        self.value = value


class Model(BaseModel):
    """Frozen, closed to unknown fields, camelCase outside and snake_case inside."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()
    immutable: ClassVar[dict[str, str]] = {}
    """Fields (JSON names) that may not change after creation, each with the reason."""
    exchangeable: ClassVar[tuple[str, ...]] = ()
    """Fields (JSON names) that may change even where what they belong to may not."""

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        for rule in self.rules:
            if not rule.holds(self):
                raise RuleBrokenError(rule, self.at(rule.field))
        return self

    def at(self, path: str) -> object:
        """Return the value at a dotted path of JSON names, None where there is none."""
        value: object = self
        for name in path.split("."):
            value = {to_camel(k): v for k, v in value}.get(name) if isinstance(value, BaseModel) else None
        return value

    def to_json_dict(self) -> dict[str, Any]:
        """Return the value as the API server would hold it: JSON names, unset optional fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def in_utc(time: datetime) -> datetime:
    """Return a time as one of UTC where it has no time zone."""
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


Timestamp = Annotated[datetime, AfterValidator(in_utc)]
"""Times of one type can be compared, whoever wrote them."""
DECIMAL_PATTERN = r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"


def _check_quoted(value: object) -> object:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError(f'is a YAML number: write "{value}", with quotes. Kubernetes APIs do not use floats')  # noqa: TRY004 pydantic wants ValueError
    return value


def decimal(low: float, high: float, *, low_included: bool = True, high_included: bool = True) -> Any:
    """A decimal number kept as a string within bounds.

    Kubernetes API conventions forbid floats in specs: they do not round-trip. CEL checks the bound there, Python here.
    """
    lower = ">=" if low_included else ">"
    upper = "<=" if high_included else "<"
    least = f"{'at least' if low_included else 'greater than'} {low:g}"
    most = f"{'at most' if high_included else 'less than'} {high:.12g}"
    allowed = f"must be {least} and {most}"

    def check(value: str) -> str:
        if not re.fullmatch(DECIMAL_PATTERN, value):
            raise ValueError(f"{allowed}, written with digits, such as 0.05 or 2e-4")
        number = float(value)
        above = number >= low if low_included else number > low
        below = number <= high if high_included else number < high
        if not (above and below):
            raise ValueError(allowed)
        return value

    schema = {
        "type": "string",
        "pattern": DECIMAL_PATTERN,
        "maxLength": 32,
        "x-kubernetes-validations": [
            {"rule": f"double(self) {lower} {float(low)} && double(self) {upper} {float(high)}", "message": allowed},
        ],
    }
    return Annotated[str, BeforeValidator(_check_quoted), AfterValidator(check), WithJsonSchema(schema)]
