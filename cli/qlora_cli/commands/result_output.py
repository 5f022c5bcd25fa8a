"""Print what a command did to jobs."""

from __future__ import annotations

import sys

from qlora_cli.text.choices import OutputFormat
from qlora_cli.text.printable import write


def print_done(jobs: list[dict[str, object]], output: OutputFormat, done: str) -> None:
    """``qlorajob.qlora.dev/tune created``, or the objects."""
    from qlora_cli.text import output as out

    if output is not OutputFormat.TEXT:
        out.write_objects(jobs, output, one=len(jobs) == 1)
        return
    write("".join(f"{out.name_of(job)} {done}\n" for job in jobs))
    sys.stdout.flush()
