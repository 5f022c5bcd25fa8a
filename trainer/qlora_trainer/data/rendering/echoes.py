"""Find out whether a template writes what others say into what the assistant is to learn.

The conversation is rendered again with other texts of the same length, letter by letter, so that a part of one is
recognized, too. What the template itself looks for stays in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qlora_trainer.data.message_keys import REASONING_KEYS
from qlora_trainer.data.rendering.compiled_template import Message

EXTRA = "qzx"
"""Stands in what is added to a conversation."""
_ROT13 = str.maketrans(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789",
    "NOPQRSTUVWXYZABCDEFGHIJKLMnopqrstuvwxyzabcdefghijklm5678901234",
)


def literals_pattern(literals: Iterable[str]) -> re.Pattern[str]:
    """Return what matches the texts that a template looks for; those of one character are too common."""
    return re.compile("|".join(re.escape(literal) for literal in literals if len(literal) > 1) or "(?!)")


def variants(
    messages: list[Message], tools: Any, kept: re.Pattern[str]
) -> Iterator[tuple[list[Message], list[dict[str, Any]] | None]]:
    """Yield messages and tools that say something else.

    Args:
        messages: before the one that is learned.
        tools: JSON schemas, or None.
        kept: matches what stays in the texts.

    """
    yield [m if m["role"] == "assistant" else _changed(m, lambda text: f"{text}{EXTRA}") for m in messages], tools
    other = [_changed(message, lambda text: _other_text(text, kept)) for message in messages]
    yield other, _described(tools, kept)
    if tools:
        function = {"name": f"{EXTRA}_tool", "description": EXTRA, "parameters": {"type": "object", "properties": {}}}
        extra = {"type": "function", "function": function} if "function" in tools[0] else function
        yield messages, [extra, *tools, extra]


def is_echo(written: str, again: str) -> bool:
    """Return whether a turn's text and that beside other texts of others differ in just these."""
    if EXTRA in again.lower() and EXTRA not in written.lower():
        return True
    pairs = zip(written, again, strict=False)
    return written != again and len(written) == len(again) and all(b in (a, _other_letter(a)) for a, b in pairs)


def _changed(message: Message, change: Callable[[str], str]) -> Message:
    changed: Message = {key: change(message[key]) for key in REASONING_KEYS if isinstance(message.get(key), str)}
    content = message.get("content")
    if isinstance(content, str):
        changed["content"] = change(content)
    elif isinstance(content, list):
        changed["content"] = [{**part, "text": change(part["text"])} if "text" in part else part for part in content]
    return {**message, **changed}


def _described(value: Any, kept: re.Pattern[str]) -> Any:
    if isinstance(value, list):
        return [_described(inner, kept) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _other_text(inner, kept) if key == "description" and isinstance(inner, str) else _described(inner, kept)
        for key, inner in value.items()
    }


def _other_text(text: str, kept: re.Pattern[str]) -> str:
    written, end = [], 0
    for match in kept.finditer(text):
        written += [*map(_other_letter, text[end : match.start()]), match.group()]
        end = match.end()
    return "".join([*written, *map(_other_letter, text[end:])])


def _other_letter(character: str) -> str:
    if character.isascii():
        return character.translate(_ROT13)
    other = chr(ord(character) ^ 1)
    return other if character.isalpha() and other.isalpha() else character
