"""Shared by all ``generate.py``: write what is generated, or say what of it is stale."""  # noqa: INP001

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def write_or_check(what: str, generated: Mapping[Path, str], target: str) -> int:
    """The command line of a generator.

    Args:
        what: is generated, for ``--help``.
        generated: every file with what it should hold.
        target: of make, which writes them.

    Returns:
        Exit code: 1 when something is stale and only looked at.

    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something is stale")
    check = parser.parse_args().check
    stale = {path: want for path, want in generated.items() if not path.exists() or path.read_text() != want}
    for path, want in stale.items():
        name = str(path.relative_to(REPOSITORY))
        if check:
            have = path.read_text() if path.exists() else ""
            sys.stdout.writelines(difflib.unified_diff(have.splitlines(True), want.splitlines(True), name, "generated"))
            sys.stdout.write(f"{name} is stale: make {target}\n")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(want)
    return int(check and bool(stale))
