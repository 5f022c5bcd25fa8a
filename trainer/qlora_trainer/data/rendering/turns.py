"""Find what the assistant writes in each of its turns, and in which context.

The context of a turn is what the model is given when it is to write it: the messages before, rendered with the prompt
for the assistant. What it writes is what the message adds to that. So the assistant's text is found by rendering the
same messages twice and not by marks, and templates that rewrite earlier turns are no exception: each turn has its own
context. Runs in a child; light to import.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_trainer.data.message_keys import REASONING_KEYS
from qlora_trainer.data.rendering.compiled_template import CompiledTemplate, Message

MARKER = r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,40}\]|\[e~\["
"""Pattern of a template's control tokens that the tokenizer does not know."""
THOUGHTS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
)
"""Begin and end of reasoning in the templates of the common families."""
CLOSING = r"</|\[/|<[^<>|]+\|>|(?i:.*(tool|think|thought).*(end|clos))"
"""Tokens that close a part of a message, such as a tool call or a thought, which are no end even where special."""
STATES: tuple[dict[str, Any], ...] = (
    {"enable_thinking": False},
    {"thinking": False},
    {"reasoning": False},
    {"enable_thinking": True},
    {"thinking": True},
)
"""Variables that templates offer to say whether the assistant reasons."""
_ANSWER, _QUESTION, _NEXT = "Zqanswerqz", "Zqquestionqz", "Zqnextqz"


class TemplateRefusedError(Exception):
    """A template cannot be trained with; ``str()`` says why in the template's own words and no row's."""


class LeftOutError(TemplateRefusedError):
    """The template does not write what the assistant says."""

    def __init__(self) -> None:
        super().__init__("leaves out what the assistant says")


@dataclass(frozen=True)
class Turn:
    """One message of the assistant."""

    message: int
    """Its place in the conversation."""
    context: str
    written: str
    """Text that the model has to write, including the end of its turn."""
    rest: str
    """Text that the template writes after the end of the last message."""


@dataclass(frozen=True)
class EndStyle:
    """The end of the assistant's turn in a template."""

    end: str
    """Follows a plain answer; whatever it ends with is the end token."""
    rest: str
    """Follows that where the answer is the last message."""
    by_next: bool
    """The next message writes it."""


@dataclass(frozen=True)
class Dialect:
    """The needs of a template, found out with a conversation of ours."""

    state: dict[str, Any]
    """Variables with which the template renders answers without reasoning."""
    style: EndStyle
    opening: str = ""
    """It writes this before an answer, and its prompt for the assistant does not."""
    parts: bool = False
    """Content must be a list of parts."""
    empty_tools: bool = False
    """It asks for a list of tools even where there are none."""
    json_arguments: bool = False
    """Arguments of a tool call must be JSON text."""
    text_content: bool = False
    """A message of tool calls must have a content, be it empty."""


class Reader:
    """Finds turns in conversations with one template.

    Args:
        template: of the job.
        tokens: the tokenizer's added tokens.
        special: those of them that are control tokens, and no text.

    """

    def __init__(self, template: CompiledTemplate, tokens: list[str], special: Iterable[str] = ()) -> None:
        self.template = template
        self.ends = {token for token in special if not re.match(CLOSING, token)} - {end for _, end in THOUGHTS}
        self.ends |= {str(template.variables.get("eos_token") or "")} - {""}
        other = sorted((t for t in tokens if t.strip() and not re.fullmatch(MARKER, t)), key=len, reverse=True)
        self.marker = re.compile("|".join([*map(re.escape, other), MARKER]))

    def states(self, reasons: bool) -> Iterator[dict[str, Any]]:
        """The states in which a turn may be rendered, the template's default first."""
        yield {}
        for state in sorted(STATES, key=lambda state: reasons not in state.values()):
            if state.keys() <= self.template.names:
                yield state

    def written(
        self, before: list[Message], tools: Any, state: dict[str, Any], context: str, answered: str
    ) -> str | None:
        """Return what the model has to write after ``context`` so that it is answered; None where they do not fit.

        Args:
            before: the messages that ``context`` was rendered from.
            tools: as both were rendered with.
            state: as both were rendered in.
            context: ends with the prompt for the assistant.
            answered: with the assistant's message as the last.

        """
        if answered.startswith(context):
            return answered[len(context) :]
        common = self.common(context, answered)
        opened = context[common:].rstrip()
        for begin, end in THOUGHTS:
            # The prompt closes a thought that the template leaves out of the answer.
            if opened.endswith(end) and opened.count(begin) <= opened.count(end):
                return answered[common:].removeprefix(end)
        header = self.header(before, tools, state) or self._last_marker(context)
        if header.strip() and answered.count(header) == context.count(header):
            # The answer changes the text before it; its own begins after the same words.
            return answered.rpartition(header)[2]
        return None

    def common(self, first: str, second: str) -> int:
        """Length of the common beginning, no marker cut in two."""
        length = common_length(first, second)
        for text in (first, second):
            near = max(0, length - 80)
            for match in self.marker.finditer(text, near):
                if match.start() < length < match.end():
                    length = match.start()
        return length

    def end_style(self, state: dict[str, Any], before: list[Message], answer: Message, tools: Any) -> EndStyle:
        """Find out how a turn ends.

        Raises:
            TemplateRefusedError: it does not.

        """
        last = _after(_ANSWER, self.template.render([*before, answer], tools, **state))
        more = {"role": "user", "content": as_parts(_NEXT) if isinstance(answer["content"], list) else _NEXT}
        try:
            going_on = _after(_ANSWER, self.template.render([*before, answer, more], tools, **state))
        except Exception:  # noqa: BLE001 it may take one question only
            going_on = last
        going_on = going_on.partition(_NEXT)[0]
        header = self.marker.search(self.header(before, tools, state))
        for length in (self.common(last, going_on), len(last)):
            part = last[:length].partition(header.group())[0] if header else last[:length]
            if part.strip():
                end = self._up_to_marker(part) or part.rstrip()
                return EndStyle(end, last[len(end) :], by_next=False)
        if match := re.compile(rf"\s*(?:{self.marker.pattern})").match(going_on):
            return EndStyle(match.group(), "", by_next=True)
        if last:
            return EndStyle(last, "", by_next=False)
        raise TemplateRefusedError(
            "writes nothing after the assistant's answer, so the model would not learn to stop: write an end token"
            " there, such as {{ eos_token }}"
        )

    def header(self, before: list[Message], tools: Any, state: dict[str, Any]) -> str:
        """Return what the template adds to begin the assistant's turn."""
        alone = self.template.render(before, tools, **state)
        asked = self.template.render(before, tools, prompt=True, **state)
        return asked[len(alone) :] if asked.startswith(alone) else ""

    def _up_to_marker(self, text: str) -> str:
        """As much of the text as ends with the tokenizer's end token, or with a marker."""
        eos = self.template.variables.get("eos_token")
        if eos and eos in text:
            return text[: text.index(eos) + len(eos)]
        ends = [match.end() for match in self.marker.finditer(text)]
        return text[: ends[-1]] if ends else ""

    def _last_marker(self, text: str) -> str:
        """The marker that the text ends with, and what white space follows it."""
        *_, last = (None, *self.marker.finditer(text, max(0, len(text) - 80)))
        return text[last.start() :] if last and not text[last.end() :].strip() else ""

    def split_end(self, written: str, following: str | None, style: EndStyle) -> tuple[str, str] | None:
        """Divide what follows a context into what the model writes, with its end, and the rest.

        Args:
            written: by the template, where the message is the last one.
            following: what it writes next where there are more; None if unknown.
            style: of the template.

        """
        if style.by_next:
            match = re.compile(rf"\s*(?:{self.marker.pattern})").match(style.end if following is None else following)
            if match:
                return written + match.group(), ""
        elif written.endswith(style.end + style.rest):
            cut = len(written) - len(style.rest)
            return written[:cut], written[cut:]
        text = written.rstrip()
        end = self._last_marker(style.end).rstrip() or style.end
        ended = any(text.endswith(known) for known in (end.strip(), *self.ends) if known)
        return (text, written[len(text) :]) if ended else None


def find_dialect(reader: Reader, before: list[Message] | None = None) -> Dialect:
    """Try conversations until one is written as it should be.

    Args:
        reader: of the template.
        before: what is said before the assistant's first message, by default a question of ours.

    Raises:
        TemplateRefusedError: says what is wrong with the template.
        Exception: what the template raises.

    """
    before = before or [{"role": "user", "content": _QUESTION}]
    failure: Exception | None = None
    for empty_tools, parts in ((False, False), (True, False), (False, True)):
        tools: Any = [] if empty_tools else None
        said = [in_parts(message) for message in before] if parts else before
        answer = {"role": "assistant", "content": as_parts(_ANSWER) if parts else _ANSWER}
        try:
            states = [state for state in reader.states(reasons=False) if _fits(reader, state, said, answer, tools)]
            # With none, the prompt opens a thought that plain answers do not close; reasoning may do.
            state = states[0] if states else {}
            style = reader.end_style(state, said, answer, tools)
            opening = "" if reader.header(said, tools, state) else _opening(reader, state, said, answer, tools)
            needs = _tool_call_needs(reader.template, said, tools)
            return Dialect(state, style, opening, parts, empty_tools, **needs)
        except Exception as error:  # noqa: BLE001 whatever a template raises: it may like the next one
            failure = failure or error
            if isinstance(error, TemplateRefusedError) and not isinstance(error, LeftOutError):
                break
    assert failure is not None
    raise failure


def _fits(reader: Reader, state: dict[str, Any], before: list[Message], answer: Message, tools: Any) -> bool:
    context = reader.template.render(before, tools, prompt=True, **state)
    answered = reader.template.render([*before, answer], tools, **state)
    written = reader.written(before, tools, state, context, answered)
    return written is not None and _ANSWER in written


def _opening(reader: Reader, state: dict[str, Any], before: list[Message], answer: Message, tools: Any) -> str:
    """Return what the template writes between a prompt that it adds nothing to, and an answer."""
    context = reader.template.render(before, tools, prompt=True, **state)
    answered = reader.template.render([*before, answer], tools, **state)
    written = reader.written(before, tools, state, context, answered) or ""
    opening = written.partition(_ANSWER)[0]
    return opening if opening.strip() else ""


def _tool_call_needs(template: CompiledTemplate, before: list[Message], tools: Any) -> dict[str, bool]:
    """Find out how a template takes tool calls; the first way is that of the field.

    A template that writes arguments as they are, which Python would quote in its own way, gets them as JSON text.
    """
    harmless: dict[str, bool] = {}
    for json_arguments, text_content in ((False, False), (False, True), (True, False), (True, True)):
        function = {"name": "zqname", "arguments": '{"zqkey": "zqvalue"}' if json_arguments else {"zqkey": "zqvalue"}}
        call = {"id": "call00001", "type": "function", "function": function}
        message = {"role": "assistant", "content": "" if text_content else None, "tool_calls": [call]}
        needs = {"json_arguments": json_arguments, "text_content": text_content}
        try:
            written = template.render([*before, message], tools)
            if "zqname" in written and "'zqkey'" not in written:
                return needs
            harmless = harmless or needs
        except Exception:  # noqa: BLE001, S110 whatever a template raises: it may like the next one
            pass
    return harmless  # it leaves them out, which is found in the rows


def in_parts(message: Message) -> Message:
    """The message with its content as a list of parts."""
    content = message.get("content")
    return {**message, "content": as_parts(content)} if isinstance(content, str) else message


def as_parts(content: str) -> list[dict[str, str]]:
    """Content as a list of one part."""
    return [{"type": "text", "text": content}]


def common_length(first: str, second: str) -> int:
    """Length of the common beginning."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    low, high = 0, shorter  # what is shorter than low is common, what is as long as high is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle)
    return low


def has_reasoning(message: Message) -> bool:
    """Return whether the assistant's message shows how it came to its answer."""
    content = message.get("content")
    return any(message.get(key) for key in REASONING_KEYS) or (
        isinstance(content, str) and any(end in content for _, end in THOUGHTS)
    )


def _after(needle: str, text: str) -> str:
    _, found, after = text.rpartition(needle)
    if not found or "'type': 'text'" in text:  # a list of parts, written as Python writes it
        raise LeftOutError
    return after
