"""Programs outside the packages import nothing of the tests. import-linter sees the packages alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = sorted(p for folder in ("benchmarks", "examples", "tools") for p in (REPOSITORY / folder).rglob("*.py"))
TESTS = {"tests"} | {
    path.stem
    for folder in ("tests", "tests/cli", "tests/operator", "tests/trainer/helpers")
    for path in (REPOSITORY / folder).iterdir()
    if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))
}
"""Modules and packages that tests import of each other."""


def imported(path: Path) -> set[str]:
    """Return the first names of all that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_programs_import_nothing_of_the_tests(path):
    beside = {p.stem for root in ("tools", "benchmarks", "examples") for p in (REPOSITORY / root).iterdir()}
    assert imported(path) & (TESTS - beside) == set()
