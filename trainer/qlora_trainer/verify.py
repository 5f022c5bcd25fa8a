"""Verify a published adapter against its manifest.

``python -m qlora_trainer.verify s3://bucket/adapter/manifest.json``

Exit code 0: every file is what was published. 1: it is not, one line for each difference. Else as
:class:`qlora_api.contract.ExitCode` has it.
"""

from __future__ import annotations

import sys

from qlora_trainer.errors import TrainerError, system_errors
from qlora_trainer.publish.published_adapter import verify_published

USAGE = "usage: python -m qlora_trainer.verify MANIFEST_URI"


def main(arguments: list[str]) -> int:
    """Verify and report; the exit code."""
    if len(arguments) != 1:
        print(USAGE, file=sys.stderr)  # noqa: T201 a command
        return 2
    try:
        with system_errors():
            problems = verify_published(arguments[0])
    except TrainerError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return int(error.exit_code)
    print("\n".join(problems) or "every file is what was published")  # noqa: T201
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
