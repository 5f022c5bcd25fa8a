"""Complete the whole command line for kubectl, which runs ``kubectl_complete-qlora``."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from qlora_cli.app import app

NO_FILES = ":4"
"""As cobra's ShellCompDirectiveNoFileComp."""


def for_kubectl() -> None:
    """Answer kubectl: arguments are the words so far, the answer one candidate a line and a directive."""
    words = ["qlora", *sys.argv[1:]]
    os.environ["_QLORA_COMPLETE"] = "complete_bash"
    os.environ["COMP_WORDS"] = " ".join(words)
    os.environ["COMP_CWORD"] = str(len(words) - 1)
    with suppress(SystemExit):
        app(prog_name="qlora")
    sys.stdout.write(f"\n{NO_FILES}\n")
