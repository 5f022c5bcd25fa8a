"""Read the configuration of a process."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qlora_api.contract import TrainerConfig
from qlora_trainer.errors import TrainerError, system_errors

if TYPE_CHECKING:
    from pathlib import Path


def read_config(path: Path) -> TrainerConfig:
    """Read a process's configuration.

    Raises:
        SystemExit: the operating system refuses the file; the reason is printed.

    """
    try:
        with system_errors():
            return TrainerConfig.model_validate_json(path.read_bytes())
    except TrainerError as error:
        print(error, file=sys.stderr)  # noqa: T201 there is no termination message to write to
        raise SystemExit(error.exit_code) from error
