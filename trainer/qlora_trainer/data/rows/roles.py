"""Roles and keys of messages, and whether one is learned, in the spellings that rows have. Light to import."""

from __future__ import annotations

from typing import Any

from qlora_trainer.data.message_keys import REASONING_KEYS
from qlora_trainer.data.rows.errors import NAME

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bot", "chatbot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function"), "tool"),
    "system": "system",
    "developer": "developer",
}
"""Role in lower case → the role that chat templates know."""
SHAREGPT_ROLES = {**ROLES, "observation": "tool"}
"""The same for ShareGPT's ``from``. As a ``role``, some templates write "observation" as it is."""
SYSTEM_ROLES = ("system", "developer")
CALL_ROLES = ("function_call", "tool_call")
"""Roles of messages that are calls of the assistant, as JSON text (LLaMA-Factory and ms-swift)."""

KNOWN_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", *REASONING_KEYS})
"""Keys of messages that are read, or that templates may leave out without a loss or with one that is counted."""
_SWITCHES = {"true": True, "1": True, "false": False, "0": False}


def known_role(role: str) -> str:
    """Return the role as chat templates know it; one that is not known stays as it is."""
    folded = role.strip().lower()
    return ROLES.get(folded, folded if folded in CALL_ROLES else role)


def as_switch(value: object) -> bool | None:
    """Return whether something is on: a boolean, 0 or 1, or one of these as text; None for all else."""
    if isinstance(value, str):
        return _SWITCHES.get(value.strip().lower())
    return bool(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def other_roles(messages: list[dict[str, Any]], template: str) -> bool:
    """Return whether a message has a role that is not known, and is no word in the text of the template either."""
    roles = {message["role"] for message in messages} - set(ROLES.values())
    return any(f"'{role}'" not in template and f'"{role}"' not in template for role in roles)


def unread_keys(messages: list[dict[str, Any]], names: frozenset[str]) -> list[str]:
    """Return the keys of messages that are neither known nor names in the template, where they look like names."""
    keys = {key for message in messages for key in message} - KNOWN_KEYS - names
    return sorted(key for key in keys if NAME.fullmatch(key))
