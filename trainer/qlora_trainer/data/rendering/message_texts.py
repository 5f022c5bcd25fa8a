"""The texts that a message says, and where they went."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from qlora_trainer.data.message_keys import REASONING_KEYS
from qlora_trainer.data.rendering.compiled_template import Message
from qlora_trainer.data.rendering.turns import THOUGHTS
from qlora_trainer.data.text_pieces import is_blank

PLACEHOLDER = "…"
"""Stands for what a row says."""
_TAGS = re.compile("|".join(re.escape(tag) for pair in THOUGHTS for tag in pair))


def squeezed(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def with_json_arguments(call: Any) -> Any:
    """Write the arguments of a tool call as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}}


def with_other_text(message: Message) -> Message:
    """Let a message say something else, unless it is the assistant's."""
    content = message.get("content")
    if message["role"] == "assistant" or not isinstance(content, str):
        return message
    return {**message, "content": f"{content}qzx"}


def hidden(value: Any, key: str = "") -> Any:
    """The same with a placeholder for every text that a row may have."""
    if isinstance(value, dict):
        return {name: hidden(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [hidden(inner, key) for inner in value]
    return PLACEHOLDER if isinstance(value, str) and key not in {"role", "type"} else value


def _leaves(message: Message) -> Iterator[str]:
    """The texts that a message says."""
    contents = message.get("content")
    for content in contents if isinstance(contents, list) else [contents]:
        text = content.get("text") if isinstance(content, dict) else content
        if isinstance(text, str):
            yield from _TAGS.split(text)
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    if isinstance(reasoning, str):
        yield reasoning
    for call in message.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield from _texts(function.get("name"))
            yield from _texts(function.get("arguments"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def says_anything(message: Message) -> bool:
    """Return whether there is a text in the message."""
    return not all(is_blank(leaf) for leaf in _leaves(message))


def texts_in(message: Message, text: str) -> tuple[int, int]:
    """Count a message's texts that stand in ``text``, and those that do not."""
    leaves = [leaf.strip() for leaf in _leaves(message) if not is_blank(leaf)]
    found = sum(_is_in(leaf, text) for leaf in leaves)
    return found, len(leaves) - found


def _is_in(leaf: str, text: str) -> bool:
    if leaf in text or json.dumps(leaf, ensure_ascii=False)[1:-1] in text or json.dumps(leaf)[1:-1] in text:
        return True
    return squeezed(leaf) in squeezed(text)


def tools_are_in(tools: list[dict[str, Any]], text: str) -> bool:
    """Return whether names and descriptions of tools and of their parameters stand in ``text``, each line by itself."""
    lines = (line.strip() for leaf in _tool_texts(tools) for line in leaf.splitlines())
    return all(_is_in(line, text) for line in lines if not is_blank(line))


def _tool_texts(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for inner in value:
            yield from _tool_texts(inner)
    elif isinstance(value, dict):
        yield from (value[key] for key in ("name", "description") if isinstance(value.get(key), str))
        if isinstance(properties := value.get("properties"), dict):
            yield from properties
        for inner in value.values():
            yield from _tool_texts(inner)


def is_missing(message: Message, text: str) -> bool:
    """Return whether the template leaves out what somebody else than the assistant says."""
    return message["role"] != "assistant" and bool(texts_in(message, text)[1])
