"""Fenced blocks of the documents, and the class that each says it belongs to.

A shell block says in its info string how it is tested, and one that does not fails a test::

    ```sh test=run         runs on this machine, in a folder with the examples and a finished quickstart
    ```sh test=cluster     runs against a cluster with the operator
    ```sh test=parse       needs what no test has (a registry, vLLM, ten minutes): its commands and options must exist

More words: ``exit=40`` is the exit code that is meant; ``shows``: the plain block below is what is printed;
``state=Running``: there is a job "quickstart" in this state beforehand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = (
    REPOSITORY / "README.md",
    REPOSITORY / "charts" / "qlora-operator" / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
)
CLASSES = ("run", "cluster", "parse")
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    words: tuple[str, ...]
    """Words of the info string after the language."""
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    @property
    def test(self) -> str:
        return self.said("test")

    @property
    def exit_code(self) -> int:
        return int(self.said("exit") or 0)

    def said(self, key: str) -> str:
        return next((word.partition("=")[2] for word in self.words if word.startswith(f"{key}=")), "")


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text("utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        language, *words = fence["info"].split() or [""]
        found.append(Block(page, text.count("\n", 0, fence.start()) + 1, language, tuple(words), fence["text"]))
    return found


def all_blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language == language]


def shell_blocks(page: Path, test: str) -> list[tuple[Block, str]]:
    """The shell blocks of a class, each with what it is said to print: the plain block below, where it says so."""
    blocks = blocks_of(page)
    following = [*blocks, None][1:]
    return [
        (block, below.text if below and "shows" in block.words else "")
        for block, below in zip(blocks, following, strict=True)
        if block.language == "sh" and block.test == test
    ]


def missing(shown: str, output: str) -> list[str]:
    """Parts of what a page says is printed that are not; … stands for anything, spaces and line breaks do not count."""
    printed = "".join(output.split())
    parts = (part for line in shown.splitlines() for part in line.split("…"))
    return [part for part in parts if "".join(part.split()) not in printed]
