"""Words that flags take. Here alone, since '--help' needs them and nothing else of what uses them."""

from __future__ import annotations

from enum import StrEnum


class OutputFormat(StrEnum):
    """``-o``."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


class PlainOutputFormat(StrEnum):
    """``-o`` of commands that need no cluster."""

    TEXT = "text"
    JSON = "json"


class DryRun(StrEnum):
    """``--dry-run``."""

    NONE = "none"
    CLIENT = "client"
    SERVER = "server"


class RowFormat(StrEnum):
    """``--format`` of 'qlora init', as spec.dataset.format."""

    MESSAGES = "Messages"
    PROMPT_COMPLETION = "PromptCompletion"
    INSTRUCTION = "Instruction"
    TEXT = "Text"
