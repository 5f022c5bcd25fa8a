"""Folders, files and functions stay small enough to be read at once."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_MODULES = 14
MOST_LINES_OF_FILE = 450
MOST_LINES_OF_FUNCTION = 70


def modules() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_folder_has_too_many_modules():
    counts = Counter(path.parent.relative_to(ROOT) for path in modules() if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_FILE} == {}


def test_no_function_is_too_long():
    functions = (
        (path, node)
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    lengths = {f"{path.relative_to(ROOT)}: {node.name}": _lines(node) for path, node in functions}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_FUNCTION} == {}


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1
