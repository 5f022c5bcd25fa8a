"""A task from the sources of the standard library on this machine: given a function's signature, write its docstring.

Modules are held out as a whole, by the hash of their name: the base never reads a held-out module, and no training
row comes from one. What is left for the base to read is code with its docstrings taken out. So fine-tuning has all of
it to teach: that a docstring follows, how it begins and ends, its style, and words that go with a function's name.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import tokenize
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

SKIPPED = {"encodings", "idle_test", "lib-dynload", "pydoc_data", "site-packages", "test", "tests"}
"""Folders that hold no prose and code of the library itself: tables, tests, other people's packages."""

HELD_OUT = 10
"""One module in this many."""

SHORTEST, LONGEST = 8, 200
"""Characters of a summary; a shorter one says nothing, a longer one is an essay."""

LONGEST_PROMPT = 250
"""Characters. With a summary's this keeps every row under 256 tokens."""

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (*_FUNCTIONS, ast.ClassDef, ast.Module)


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    source: str
    tree: ast.Module

    @property
    def held_out(self) -> bool:
        """Decided by the name alone: the same on every machine, whatever other modules there are."""
        # _pydecimal and decimal, _pyio and io are twins with the same docstrings: they must fall on the same side.
        family = ".".join(part.removeprefix("_py").strip("_") for part in self.name.split("."))
        return int.from_bytes(hashlib.sha256(family.encode()).digest()[:4]) % HELD_OUT == 0


@dataclass(frozen=True)
class Row:
    """One function: what is given, and what is to be said."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class SplitRows:
    train: tuple[Row, ...]
    eval: tuple[Row, ...]


def source_files(root: Path | None = None) -> list[Path]:
    """Python files of the standard library, sorted."""
    root = root or Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if SKIPPED.isdisjoint(p.relative_to(root).parts))


def read_modules(root: Path | None = None) -> list[Module]:
    """The modules that can be parsed; the library has templates that cannot."""
    root = root or Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in source_files(root):
        with tokenize.open(path) as file:
            source = file.read()
        tree = _parse(source)
        if tree is not None:
            modules.append(Module(".".join(path.relative_to(root).with_suffix("").parts), source, tree))
    return modules


def pretraining_texts(modules: Iterable[Module]) -> list[str]:
    """Return the texts that the base reads: the code of all modules that are not held out, without docstrings."""
    return [without_docstrings(m) for m in modules if not m.held_out]


def without_docstrings(module: Module) -> str:
    """Take the docstrings out; where one was the whole body, ``pass`` takes its place."""
    lines = module.source.splitlines()
    for node in ast.walk(module.tree):
        docstring = _docstring(node)
        if docstring is None or docstring.lineno == getattr(node, "lineno", 0):
            continue
        first, last = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
        alone = not isinstance(node, ast.Module) and len(getattr(node, "body", ())) == 1
        lines[first:last] = [" " * docstring.col_offset + "pass" if alone else _GONE, *[_GONE] * (last - first - 1)]
    return "\n".join(line for line in lines if line is not _GONE) + "\n"


def extract(modules: Sequence[Module]) -> SplitRows:
    """Rows of all modules, each once; a held-out row that also stands in a training module is left out of both."""
    train = list(dict.fromkeys(row for m in modules if not m.held_out for row in _rows(m)))
    prompts, completions = {row.prompt for row in train}, {row.completion for row in train}
    held_out = dict.fromkeys(row for m in modules if m.held_out for row in _rows(m))
    return SplitRows(
        train=tuple(train),
        eval=tuple(row for row in held_out if row.prompt not in prompts and row.completion not in completions),
    )


_GONE = "\0"
"""Stands for a line to leave out; no source line has a NUL."""


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes and the like, in files that are not ours
        try:
            return ast.parse(source)
        except SyntaxError:
            return None


def _docstring(node: ast.AST) -> ast.Expr | None:
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        first = node.body[0]
        assert isinstance(first, ast.Expr)
        return first
    return None


def _rows(module: Module) -> Iterator[Row]:
    yield from _visit(module.tree, inside=None)


def _visit(node: ast.AST, inside: ast.ClassDef | None) -> Iterator[Row]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _FUNCTIONS):
            row = _row(child, inside)
            if row is not None:
                yield row
            yield from _visit(child, inside=None)
        else:
            yield from _visit(child, inside=child if isinstance(child, ast.ClassDef) else inside)


def _row(function: ast.FunctionDef | ast.AsyncFunctionDef, inside: ast.ClassDef | None) -> Row | None:
    docstring = ast.get_docstring(function)
    if docstring is None:
        return None
    summary = " ".join(docstring.split("\n\n", 1)[0].split())
    prompt = _signature(function, inside)
    if not SHORTEST <= len(summary) <= LONGEST or len(prompt) > LONGEST_PROMPT or _unquotable(summary):
        return None
    indent = " " * (8 if inside else 4)
    return Row(prompt, f'\n{indent}"""{summary}"""')


def _unquotable(summary: str) -> bool:
    """Return whether it would need escapes between quotes, or is an example rather than words."""
    return any(mark in summary for mark in ('"""', "\\", ">>>")) or summary.endswith('"')


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef, inside: ast.ClassDef | None) -> str:
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    line = f"{keyword} {function.name}({ast.unparse(function.args)}){returns}:"
    return f"class {inside.name}:\n    {line}" if inside else line
