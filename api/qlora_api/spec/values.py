"""Kinds of values that several groups have: places, names, texts with bounds."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

REMOTE_SCHEMES = ("hf", "s3", "gs", "az", "pvc")
STORE_SCHEMES = ("s3", "gs", "az", "pvc")


def _remote_only(schemes: tuple[str, ...]) -> list[dict[str, str]]:
    names = ", ".join(f"{s}://org/name" if s == "hf" else f"{s}://" for s in schemes)
    return [
        {
            "rule": f"self.matches('^({'|'.join(schemes)})://.+')",
            "message": f"must start with one of {names}; a local path works only with 'qlora run'",
        }
    ]


def _check_scheme(schemes: tuple[str, ...], value: str) -> str:
    """Take a local path too, which only the API server refuses."""
    scheme, separator, rest = value.partition("://")
    if not separator or scheme == "file" or (scheme in schemes and rest):
        return value
    problem = f"has nothing after {scheme}://" if scheme in schemes else f'scheme "{scheme}://" is not known here'
    raise ValueError(f"{problem}; use {', '.join(s + '://' for s in schemes)} or a local path")


def check_no_boolean(value: object) -> object:
    """Refuse true for 1, which are equal in Python, so that a Literal takes either."""
    if isinstance(value, bool):
        raise ValueError("must be a whole number, without quotes and without a unit")  # noqa: TRY004 pydantic wants ValueError
    return value


_LENGTH = StringConstraints(min_length=1, max_length=1024)
Source = Annotated[
    str,
    _LENGTH,
    AfterValidator(partial(_check_scheme, REMOTE_SCHEMES)),
    Field(json_schema_extra={"x-kubernetes-validations": _remote_only(REMOTE_SCHEMES)}),
]
Destination = Annotated[
    str,
    _LENGTH,
    AfterValidator(partial(_check_scheme, STORE_SCHEMES)),
    Field(json_schema_extra={"x-kubernetes-validations": _remote_only(STORE_SCHEMES)}),
]
Name = Annotated[str, StringConstraints(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Column = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Token = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Label = Annotated[str, StringConstraints(max_length=317)]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?([EPTGM]i?|[kKm]|Ki)?$", max_length=32)]
"""As Kubernetes writes amounts: 500m, 4, 16Gi."""
