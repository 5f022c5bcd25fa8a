"""The texts that a message says, and where they went."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_trainer.data.message_keys import REASONING_KEYS
from qlora_trainer.data.rendering.compiled_template import Message
from qlora_trainer.data.rendering.turns import THOUGHTS
from qlora_trainer.data.text_pieces import is_blank

PLACEHOLDER = "…"
"""Stands for what a row says."""
MOST_WORK = 10**9
"""Characters to search for all texts of a conversation; beyond these each is only looked for once."""
_GAP = "\0"
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


def hidden(value: Any, key: str = "") -> Any:
    """The same with a placeholder for every text that a row may have."""
    if isinstance(value, dict):
        return {name: hidden(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [hidden(inner, key) for inner in value]
    return PLACEHOLDER if isinstance(value, str) and key not in {"role", "type"} else value


def _leaves(message: Message) -> Iterator[Any]:
    """The texts, numbers and other plain values that a message says."""
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
            yield from _values(function.get("name") or "")
            arguments = function.get("arguments")
            yield from _values(_arguments(arguments) if isinstance(arguments, str) else arguments or {})


def _arguments(text: str) -> Any:
    """The arguments of a call as the template was given them: JSON text, or what it stands for."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _values(value: Any) -> Iterator[Any]:
    """Keys and plain values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner)
    else:
        yield value


def _forms(leaf: Any) -> Iterator[str]:
    """The ways to write a value, without white space, the usual one first."""
    if not isinstance(leaf, str):
        yield json.dumps(leaf)
        yield str(leaf)
        return
    leaf = leaf.strip()
    yield squeezed(leaf)
    escaped = json.dumps(leaf, ensure_ascii=False)[1:-1]
    yield squeezed(escaped)
    yield squeezed(json.dumps(leaf)[1:-1])
    yield squeezed(json.dumps(escaped, ensure_ascii=False)[1:-1])
    yield squeezed(repr(leaf)[1:-1])


def says_anything(message: Message) -> bool:
    """Return whether there is a text or another value in the message."""
    return any(not isinstance(leaf, str) or not is_blank(leaf) for leaf in _leaves(message))


def count_written(messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """Count, for each message, what it says that stands in ``text``, and what does not.

    What is said several times must stand there as often, and a longer text is looked for before those that may be a
    part of it: a text that the template leaves out is not found in another message. White space does not matter.
    """
    text = squeezed(text)
    said: dict[str, tuple[Any, list[int]]] = {}
    for place, message in enumerate(messages):
        for leaf in _leaves(message):
            if not isinstance(leaf, str) or not is_blank(leaf):
                said.setdefault(next(_forms(leaf)), (leaf, []))[1].append(place)
    once_is_enough = len(said) * len(text) > MOST_WORK
    counts = [[0, 0] for _ in messages]
    for key in sorted(said, key=len, reverse=True):
        leaf, places = said[key]
        left = len(places)
        for form in _forms(leaf):
            found = min(left, left * (form in text) if once_is_enough else text.count(form))
            left -= found
            text = text if once_is_enough or not found else text.replace(form, _GAP, found)
            if not left:
                break
        for number, place in enumerate(places):
            counts[place][number < left] += 1
    return [(found, missing) for found, missing in counts]


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


def without_thought(message: Message) -> Message:
    """Return what must stay of the assistant's message once others follow: its answer, or else its calls."""
    if message["role"] != "assistant":
        return message
    message = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    if message.get("tool_calls"):
        return {**message, "content": ""}
    contents = message.get("content")
    if isinstance(contents, str):
        return {**message, "content": _TAGS.split(contents)[-1]}
    return {**message, "content": [{**part, "text": _TAGS.split(part["text"])[-1]} for part in contents or []]}
