"""Kinds of values that several groups have: places, names, texts with bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

REMOTE_SCHEMES = ("hf", "s3", "gs", "az", "pvc")
STORE_SCHEMES = ("s3", "gs", "az", "pvc")


def _known_scheme(value: str) -> str:
    scheme, separator, _ = value.partition("://")
    if separator and scheme not in (*REMOTE_SCHEMES, "file"):
        raise ValueError(
            f'scheme "{scheme}://" is not known; use {", ".join(s + "://" for s in REMOTE_SCHEMES)} or a local path'
        )
    return value


def _remote_only(schemes: tuple[str, ...]) -> list[dict[str, str]]:
    names = ", ".join(f"{s}://org/name" if s == "hf" else f"{s}://" for s in schemes)
    return [
        {
            "rule": f"self.matches('^({'|'.join(schemes)})://.+')",
            "message": f"must start with one of {names}; a local path works only with 'qlora run'",
        }
    ]


Uri = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_known_scheme)]
Source = Annotated[Uri, Field(json_schema_extra={"x-kubernetes-validations": _remote_only(REMOTE_SCHEMES)})]
Destination = Annotated[Uri, Field(json_schema_extra={"x-kubernetes-validations": _remote_only(STORE_SCHEMES)})]
Name = Annotated[str, StringConstraints(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Column = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Label = Annotated[str, StringConstraints(max_length=317)]
