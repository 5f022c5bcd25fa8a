"""Options of the commands that need no cluster, and how these commands end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.text.printable import write_line

USER_ERROR = 40
"""As ``qlora_api.contract.ExitCode.USER_ERROR``, without the import; a test holds them together."""


class Output(StrEnum):
    TEXT = "text"
    JSON = "json"


Job = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="Manifest with one QLoRAJob; - reads standard input.")]


RunsDir = Annotated[Path, typer.Option(help="Folder of all local runs.")]


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Set a field, such as training.maxSteps=10; null unsets the field."
    ),
]


As = Annotated[Output, typer.Option("-o", "--output", help="Output format: text or json.")]


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """A user's error: in words on standard error, and the contract's exit code."""
    # All errors in words derive from ValueError; a pydantic error from our own objects is a bug and must be seen.
    from pydantic import ValidationError

    try:
        yield
    except ValidationError:
        raise
    except ValueError as error:
        write_line(error, error=True)
        raise typer.Exit(USER_ERROR) from None
