"""Check that a command of a document exists: the program, its command, its options, the files that it names."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING

import typer
import yaml

from docs.blocks import REPOSITORY
from qlora_cli.app import app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OTHERS = {"cat", "cd", "cosign", "docker", "eval", "export", "git", "ls", "sed", "true", "uv", "vllm", "wandb"}
"""Programs that are not ours to check."""
KUBECTL = {
    *("apply", "auth", "cordon", "create", "delete", "describe", "explain", "get", "logs", "patch", "rollout", "wait"),
}
HELM = {"install", "template", "uninstall", "upgrade"}
UsageError = typer.BadParameter.__mro__[1]
"""Typer exports the one and not the other."""
_HEREDOC = re.compile(r"<<-?'?(?P<end>\w+)'?(?P<rest>[^\n]*)\n.*?^(?P=end)$", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"^(examples|charts|benchmarks|docs|tests)/\S+$")
_REDIRECTIONS = {">", ">>", "<", "2>", "2>&1"}
_ENDS = {"|", "||", "&&", ";", "&"}


class NoCommandError(Exception):
    """There is no such command; the text says what is not there."""


def check(text: str) -> None:
    """Check every command of a block.

    Raises:
        NoCommandError: the first that does not exist.

    """
    for words in simple_commands(text):
        program = PurePath(words[0]).name
        if program not in CHECKS and program not in OTHERS:
            raise NoCommandError(f"{program}: no program that is known here")
        for word in words:
            if _PATH.match(word) and not (REPOSITORY / word).exists():
                raise NoCommandError(f"{word} is not there")
        if program in CHECKS:
            CHECKS[program](words[1:])


def simple_commands(text: str) -> Iterator[list[str]]:
    """Each command as words, without pipes, redirections, variables set before it, and here-documents."""
    text = _HEREDOC.sub(lambda found: found["rest"], text).replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        tokens = iter([*lexer, ";"])
        for token in tokens:
            if token in _REDIRECTIONS:
                next(tokens)
            elif token not in _ENDS:
                words.append(token)
            elif words:
                yield words
                words = []


def _qlora(arguments: list[str]) -> None:
    group = typer.main.get_command(app)
    try:
        with group.make_context("qlora", list(arguments)) as outer:
            name, command, rest = group.resolve_command(outer, [*outer._protected_args, *outer.args])
            with command.make_context(name, rest, parent=outer):
                pass
    except typer.Exit:
        return  # --help, --version
    except UsageError as error:
        raise NoCommandError(f"qlora {' '.join(arguments)}: {error.format_message()}") from error


def _kubectl(arguments: list[str]) -> None:
    if arguments[0] == "qlora":
        return _qlora(arguments[1:])
    verb = next((word for word in arguments if not word.startswith("-")), "")
    if verb not in KUBECTL:
        raise NoCommandError(f"kubectl {verb}: not among those that documents use")
    return None


def _helm(arguments: list[str]) -> None:
    if arguments[0] not in HELM:
        raise NoCommandError(f"helm {arguments[0]}: not among those that documents use")
    values = yaml.safe_load((REPOSITORY / "charts" / "qlora-operator" / "values.yaml").read_text())
    for option, value in pairwise(arguments):
        if option in ("--set", "--set-string"):
            key = value.partition("=")[0]
            here = values
            for part in key.split("."):
                if part not in here:
                    raise NoCommandError(f"{key} is no value of the chart")
                here = here[part]


def _make(arguments: list[str]) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in (word for word in arguments if "=" not in word):
        if not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE):
            raise NoCommandError(f"make {target}: no such target")


CHECKS: dict[str, Callable[[list[str]], None]] = {"helm": _helm, "kubectl": _kubectl, "make": _make, "qlora": _qlora}
