"""From cells of a row to a conversation: messages, tools, and which of the messages may be learned.

A message keeps all of its keys and values, nested nulls included, with these exceptions: ``from`` and ``value``
(ShareGPT) become ``role`` and ``content``; roles in other spellings become those that templates know;
``function_call`` (OpenAI before tool calls) and messages of the role ``tool_call`` become ``tool_calls``; text parts
become one text; ``weight`` and its like are taken out and heeded; tool calls and their ``arguments`` that are JSON text
are decoded; and a null where OpenAI's format has an optional key means that it is absent.
Errors name row, message and key, and no text of the row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_trainer.data.message_keys import REASONING_KEYS
from qlora_trainer.data.rows.errors import SURROGATE, SURROGATE_PROBLEM
from qlora_trainer.data.rows.remarks import CONTINUED, FUNCTIONS_UNUSED, NOT_CONTINUED, SYSTEM_COLUMN, SYSTEM_UNUSED
from qlora_trainer.data.rows.roles import CALL_ROLES, SHAREGPT_ROLES, SYSTEM_ROLES, as_switch, known_role
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from qlora_trainer.data.rows.place import RowNumber

Message = dict[str, Any]

WEIGHT = "weight"
SWITCHES = ("loss", "train", "training")
"""Other names of a weight: of ms-swift and of axolotl."""
MEASURED = "loss"
"""The one of ``SWITCHES`` that may also hold a measured loss, which is no weight and is ignored."""
PART_WEIGHTS = ("train_detail", "training_detail")
"""Weights of parts of a message (axolotl)."""
NO_NUMBER = "NaN, Infinity or a number beyond 1.8e308, which JSON has not"


@dataclass(frozen=True)
class Conversation:
    """Input of a chat template, with what of it may be learned."""

    messages: list[Message]
    weights: tuple[bool, ...]
    """For each message: False for ``weight: 0``."""
    tools: list[dict[str, Any]] | None = None
    given: int = 0
    """The first messages that are a prompt, and count only where lossOn is All."""
    continues: bool = False
    """The first message after the prompt goes on with the last one of the prompt."""
    remarks: tuple[str, ...] = ()
    """See :mod:`qlora_trainer.data.rows.remarks`."""

    def with_system(self, text: Any, column: str) -> Conversation:
        """Put the text of a column first as the system message, unless there is one, as axolotl does."""
        if text is None or (isinstance(text, str) and not text.strip()):
            return self
        first = self.messages[0]
        if isinstance(text, str) and first["role"] not in SYSTEM_ROLES:
            return replace(
                self,
                messages=[{"role": "system", "content": text}, *self.messages],
                weights=(True, *self.weights),
                given=self.given and self.given + 1,
                remarks=(*self.remarks, SYSTEM_COLUMN.format(column=column)),
            )
        if first.get("content") == text:
            return self
        return replace(self, remarks=(*self.remarks, SYSTEM_UNUSED.format(column=column)))

    def with_functions(self, cell: Any) -> Conversation:
        """Take descriptions of functions (OpenAI before tools) for tools, where there are none."""
        try:
            functions = _decoded(cell, "") if isinstance(cell, str) and cell.strip() else cell
        except _ShapeError:
            functions = cell
        if not functions:
            return self
        is_list = isinstance(functions, list)
        if self.tools or not is_list or not all(isinstance(f, dict) and "name" in f and _is_json(f) for f in functions):
            return replace(self, remarks=(*self.remarks, FUNCTIONS_UNUSED))
        return replace(self, tools=[{"type": "function", "function": function} for function in functions])

    @property
    def learned(self) -> tuple[bool, ...]:
        """For each message: False for ``weight: 0`` and for the prompt. Of the others those of the assistant count."""
        return (False,) * self.given + self.weights[self.given :]


class _ShapeError(Exception):
    """``str()`` completes "row N holds …"."""


def read_conversation(messages: Any, tools: Any, number: RowNumber, field: str) -> Conversation:
    """Read a cell of messages.

    Args:
        messages: list of {role, content, …}, the same as JSON text, or an object with one list for each key.
        tools: list of tool descriptions, the same as JSON text, or None.
        number: of the row.
        field: the manifest's, that names the column of the messages.

    Raises:
        UserError: it is none.

    """
    try:
        pairs = _messages(messages)
        return Conversation([m for m, _ in pairs], tuple(weight for _, weight in pairs), _tools(tools))
    except _ShapeError as error:
        raise UserError(
            field,
            None,
            f'must hold a list of messages such as {{"role": "user", "content": "…"}} in every row; row {number} holds'
            f" {error}",
        ) from None


def read_exchange(prompt: Any, completion: Any, tools: Any, number: RowNumber, fields: tuple[str, str]) -> Conversation:
    """Read a prompt and a completion that are conversations (TRL's conversational format); the prompt is not learned.

    A completion goes on with the message of the assistant that ends the prompt, as generation does with
    ``continue_final_message``.

    Raises:
        UserError: one of them is no conversation.

    """
    given = read_conversation(prompt, tools, number, fields[0])
    answer = read_conversation(completion, None, number, fields[1])
    messages, weights = given.messages + answer.messages, given.weights + answer.weights
    last, first = given.messages[-1], answer.messages[0]
    remarks: tuple[str, ...] = ()
    continues = len(given.messages) > 1 and _continues(last, first)
    if last["role"] == first["role"] == "assistant":
        remarks = (CONTINUED,) if continues else (NOT_CONTINUED,)
    return Conversation(messages, weights, given.tools, len(given.messages), continues, remarks)


def _continues(last: Message, first: Message) -> bool:
    """Return whether the first message of a completion can be the rest of the last one of its prompt."""
    of_assistant = last["role"] == first["role"] == "assistant"
    return of_assistant and "tool_calls" not in last and not any(first.get(key) for key in REASONING_KEYS)


def is_json_messages(text: Any) -> bool:
    """Return whether something is a text that is the JSON of a list of messages."""
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return False
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(found) and all(isinstance(m, dict) and ("role" in m or {"from", "value"} <= m.keys()) for m in found)


def _messages(value: Any) -> list[tuple[Message, bool]]:
    value = _decoded(value, "text that is not JSON") if isinstance(value, str) else value
    if isinstance(value, dict):
        value = _transposed(value)
    if not isinstance(value, list) or not value:
        raise _ShapeError(json_type(value) if value else "nothing")
    pairs: list[tuple[Message, bool]] = []
    for place, message in enumerate(value, start=1):
        pairs.append(_message(message, place))
        if len(pairs) > 1 and all(pair[0]["role"] in CALL_ROLES for pair in pairs[-2:]):
            (first, first_weight), (second, second_weight) = pairs[-2:]  # calls at once are one message
            calls = first["tool_calls"] + second["tool_calls"]
            pairs[-2:] = [({**first, **second, "tool_calls": calls}, first_weight and second_weight)]
    return [({**m, "role": "assistant"} if m["role"] in CALL_ROLES else m, weight) for m, weight in pairs]


def _message(value: Any, place: int) -> tuple[Message, bool]:
    """(message as templates expect it, its weight)."""
    if not isinstance(value, dict):
        raise _ShapeError(f"{json_type(value)} as message {place}")
    message = {key: inner for key, inner in value.items() if inner is not None}
    if "role" not in message and "from" in message and "value" in value:
        message = _from_sharegpt(message, place)
    if not isinstance(message.get("role"), str):
        raise _ShapeError(f"a message {place} without a role")
    message["role"] = known_role(message["role"])
    learned = _learned(message, place)
    for key in REASONING_KEYS:
        if not isinstance(message.get(key, ""), str):
            raise _ShapeError(f"a message {place} whose {key} is {json_type(message[key])}, not a text")
    if message["role"] in CALL_ROLES and not message.get("tool_calls"):
        message["tool_calls"] = _calls_of(message.pop("content", None), place)
    elif called := _call_alone(message, place):
        message["tool_calls"] = [called]
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], place)
        if not message["tool_calls"]:
            del message["tool_calls"]
            message.setdefault("content", "")
    if "content" in message:
        message["content"] = _content(message["content"], place)
    elif "tool_calls" not in message:
        raise _ShapeError(f"a message {place} without content")
    return message, learned


def _learned(message: Message, place: int) -> bool:
    """Take the weight out of a message."""
    if part := next((key for key in PART_WEIGHTS if message.get(key)), None):
        raise _ShapeError(f"a message {place} with {part}; a message is learned as a whole or, by weight 0, not at all")
    learned = as_switch(message.pop(WEIGHT, 1))
    if learned is None:
        raise _ShapeError(f"a message {place} with a weight other than 0 (context) and 1 (learned)")
    for key in SWITCHES:
        value = message.get(key, True)
        switch = as_switch(value)
        if switch is not None:
            message.pop(key, None)
            learned &= switch
        elif not (key == MEASURED and isinstance(value, (int, float))):
            raise _ShapeError(f"a message {place} with {key} other than false (context) and true (learned)")
    return learned


def _from_sharegpt(message: Message, place: int) -> Message:
    speaker = message["from"].strip().lower() if isinstance(message["from"], str) else ""
    role = speaker if speaker in CALL_ROLES else SHAREGPT_ROLES.get(speaker)
    if role is None:
        allowed = ", ".join((*SHAREGPT_ROLES, *CALL_ROLES))
        raise _ShapeError(f'a message {place} whose "from" is none of {allowed}')
    rest = {key: inner for key, inner in message.items() if key not in ("from", "value")}
    return {"role": role, **({"content": message["value"]} if "value" in message else {}), **rest}


def _content(value: Any, place: int) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _ShapeError(
            f"a message {place} whose content is {json_type(value)}; allowed are a text and a list of text parts"
        )
    return "".join(_part(part, place, number) for number, part in enumerate(value, start=1))


def _part(part: Any, place: int, number: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise _ShapeError(
        f'a message {place} whose content part {number} is no text; parts must be {{"type": "text", "text": "…"}}'
    )


def _call_alone(message: Message, place: int) -> Message | None:
    """Take ``function_call`` out of a message, as a tool call."""
    value = message.pop("function_call", None)
    if isinstance(value, str):
        value = _decoded(value.strip() or "{}", f"a message {place} whose function_call is text that is not JSON")
    if not value:
        return None
    if not isinstance(value, dict):
        raise _ShapeError(f"a message {place} whose function_call is {json_type(value)}, not an object")
    if message.get("tool_calls"):
        raise _ShapeError(f"a message {place} with both tool_calls and function_call")
    return {"type": "function", "function": value}


def _calls_of(content: Any, place: int) -> list[Message]:
    """Read a message that is a call, or a list of calls, as JSON text."""
    what = f'a message {place} that is no call such as {{"name": "…", "arguments": {{}}}}'
    value = _decoded(content, what) if isinstance(content, str) else content
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise _ShapeError(what)
    return [{"type": "function", "function": call} for call in calls]


def _tool_calls(value: Any, place: int) -> list[Message]:
    if isinstance(value, str):
        value = _decoded(value.strip() or "null", f"a message {place} whose tool_calls are text that is not JSON")
        value = [] if value is None else value
    if not isinstance(value, list):
        raise _ShapeError(f"a message {place} whose tool_calls are {json_type(value)}, not a list")
    return [_tool_call(call, f"a message {place} whose tool_calls[{at}]") for at, call in enumerate(value)]


def _tool_call(value: Any, what: str) -> Message:
    if not isinstance(value, dict):
        raise _ShapeError(f"{what} is {json_type(value)}, not an object")
    call = {key: inner for key, inner in value.items() if inner is not None}
    if "function" in call:
        return {**call, "function": _tool_call(call["function"], f"{what}.function")}
    if isinstance(text := call.get("arguments"), str):
        decoded = _decoded(text.strip() or "null", f"{what}.arguments is text that is not JSON")
        call["arguments"] = {} if decoded is None else decoded
    if not isinstance(call.get("arguments", {}), dict):
        raise _ShapeError(f"{what}.arguments is {json_type(call['arguments'])}, not an object or JSON text of one")
    if not _is_json(call.get("arguments")):
        raise _ShapeError(f"{what}.arguments with {NO_NUMBER}")
    return call


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        value = _decoded(value.strip() or "null", "tools that are text but not JSON")
    if not value:
        return None
    if not isinstance(value, list):
        raise _ShapeError(f"tools that are {json_type(value)}, not a list of objects")
    for tool in value:
        if not isinstance(tool, dict):
            raise _ShapeError(f"{json_type(tool)} among its tools; each must be an object")
    if not _is_json(value):
        raise _ShapeError(f"tools with {NO_NUMBER}")
    return value


def _transposed(columns: dict[str, Any]) -> list[Message]:
    """One message for each place of lists of equal length; so ``datasets`` writes a Sequence of structs."""
    lists = list(columns.values())
    if not all(isinstance(cells, list) and len(cells) == len(lists[0]) for cells in lists):
        raise _ShapeError("an object, not a list of messages")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*lists, strict=True)]


def _decoded(text: str, otherwise: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise _ShapeError(otherwise) from None
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _ShapeError(f"JSON text that {SURROGATE_PROBLEM}") from None
    return value


def _is_json(value: Any) -> bool:
    """Return whether all numbers are such as JSON has: neither NaN nor too large, as Python reads them."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def json_type(value: object) -> str:
    """Name the type of a value as JSON calls it."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")
