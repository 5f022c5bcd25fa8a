"""A file's fields as far as commands read them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from qlora_api.base import DECIMAL_PATTERN, Model

Integer = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Size = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""Bytes."""
DecimalText = Annotated[str, Field(pattern=f"{DECIMAL_PATTERN}|^$")]
Group = dict[str, Any]


class Recorded(Model):
    """Fields that are read; a file may have others."""

    model_config = ConfigDict(extra="ignore")
