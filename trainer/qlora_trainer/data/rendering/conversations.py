"""Conversations to texts, and which parts of them the assistant wrote. A service of a child; light to import.

::

    conversation ──► turns: (context, what is written there) ──► examples: pieces of text that count or do not
                     one for each message to be learned          turns are joined while one's context begins with the
                                                                 one before; where the template rewrites it, the next
                                                                 example begins

What counts is checked three times: it may not change with what others say, marks of the template must agree with it,
and what the message says must be in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qlora_trainer.data.message_keys import REASONING_KEYS
from qlora_trainer.data.rendering import echoes
from qlora_trainer.data.rendering.compiled_template import CLOCK, MARK_START, MARK_STOP, Message, TemplateWords
from qlora_trainer.data.rendering.continued import Continued
from qlora_trainer.data.rendering.message_texts import (
    PLACEHOLDER,
    count_written,
    hidden,
    says_anything,
    squeezed,
    tools_are_in,
    with_json_arguments,
    without_thought,
)
from qlora_trainer.data.rendering.rendered import Example, Rendered
from qlora_trainer.data.rendering.turns import (
    THOUGHTS,
    Dialect,
    Reader,
    TemplateRefusedError,
    Turn,
    as_parts,
    find_dialect,
    has_reasoning,
)
from qlora_trainer.data.rendering.whole import render_whole

MARKS = "{% generation %} … {% endgeneration %}"
MOST_SHAPES = 256
"""Maximum number of shapes of conversations that are checked; later ones are like those before."""
QUOTED = 60
"""Characters of a template that an error shows."""


@dataclass
class Renderer:
    """Renders the conversations of one dataset."""

    reader: Reader
    dialect: Dialect | None = None
    """Found with a conversation of ours, else with the first of the rows."""
    shapes: set[Any] = field(default_factory=set)
    """Shapes of the conversations that were checked."""
    states: set[str] = field(default_factory=set)
    """Other than the default that turns were rendered in, as text."""
    ignores_tools: bool = False
    """It has not written some."""

    def render(self, messages: list[Message], tools: Any, learned: list[bool], continued: int = 0) -> Rendered:
        """Return the examples of a conversation.

        Args:
            messages: with their roles.
            tools: JSON schemas, or None.
            learned: whether a message may be learned, for each message; only the assistant's are.
            continued: place of the message that goes on with the one before; 0: none does.

        Raises:
            TemplateRefusedError: the assistant's text cannot be found, or marks differ from it.
            Exception: what the template raises.

        """
        joined = Continued.of(messages, learned, continued)
        if joined:
            messages, learned = joined.messages, joined.learned
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant" and learned[i]]
        done = Rendered([])
        if not places:
            return done
        if places[0] == 0:
            raise TemplateRefusedError(
                "has no text before the assistant's first message: begin the conversation with another message, or give"
                " that one weight 0"
            )
        if self.dialect is None:
            self.dialect = find_dialect(self.reader, messages[: places[0]])
        messages, tools = self._adapted(messages), self._tools(tools)
        turns, left_out, state = [], set[int](), dict[str, Any]()
        for place in places:
            if not says_anything(messages[place]):
                done.empty += 1
                continue
            turn, its_state = self.turn(messages, place, tools)
            [(said, missing)] = count_written([messages[place]], turn.written)
            left_out |= {place} if missing else set()
            if said:
                state = its_state
                self._check_shape(messages, turn, tools, state)
                turns.append(joined.cut(turn) if joined else turn)
                self._check_end(turns[-1].written, place)
            else:
                done.empty += 1
        if turns:
            before = [without_thought(message) for message in messages[: turns[-1].message]]
            written = count_written(before, turns[-1].context)
            left_out |= {place for place, (_, missing) in enumerate(written) if missing}
            self._count_tools(done, messages[: turns[-1].message], tools, turns[-1].context, prompt=True, **state)
            done.examples = list(_joined(turns, self.end or ""))
        done.left_out += len(left_out)
        return done

    def turn(self, messages: list[Message], place: int, tools: Any) -> tuple[Turn, dict[str, Any]]:
        """Return one turn, and the state in which the template writes it.

        Raises:
            TemplateRefusedError: no state of the template begins the turn as it is written.

        """
        message = messages[place]
        reasons = has_reasoning(message)
        for state in self.reader.states(reasons):
            context = self._text(messages[:place], tools, state, prompt=True)
            answered = self._text(messages[: place + 1], tools, state)
            written = self.reader.written(messages[:place], tools, state, context, answered)
            if written is None and not state:
                written = self._continue_thought(message, context, answered)
            if written is not None:
                return self._ended(messages, place, tools, state, context, written, answered), state
        if not reasons:
            # A template that always opens a thought is given an empty one, as those write that have a state for it.
            thinking = {**message, REASONING_KEYS[0]: "\n"}
            context = self._text(messages[:place], tools, {}, prompt=True)
            answered = self._text([*messages[:place], thinking], tools, {})
            if (written := self.reader.written(messages[:place], tools, {}, context, answered)) is not None:
                self.states.add("an empty thought")
                return self._ended(messages, place, tools, {}, context, written, answered), {}
        raise TemplateRefusedError(self._difference(messages, place, tools))

    def _count_tools(self, done: Rendered, messages: list[Message], tools: Any, text: str, **options: Any) -> None:
        """Note whether tools are in ``text``, rendered from these messages with these options."""
        if not tools:
            return
        done.tools = tools_are_in(tools, text)
        if done.tools:  # they may stand there whatever the tools are
            with suppress(Exception):  # a template may need tools
                done.tools = self.reader.template.render(messages, self._tools(None), **options) != text
        done.left_out += not done.tools
        self.ignores_tools |= not done.tools

    def prompt(self, messages: list[Message], tools: Any = None) -> str:
        """Return what the model is given to answer."""
        state = self.dialect.state if self.dialect else {}
        return self._text(self._adapted(messages), self._tools(tools), state, prompt=True)

    def everything(self, messages: list[Message], tools: Any, learned: list[bool], continued: int = 0) -> Rendered:
        """Return the whole conversation as one example; see :func:`render_whole`."""
        if joined := Continued.of(messages, learned, continued):
            if learned[continued - 1] != learned[continued]:
                raise TemplateRefusedError(
                    f"has one message {continued} to write of which a part has weight 0: with lossOn All, give the last"
                    " message of the prompt the same weight as the first of the completion"
                )
            messages, learned = joined.messages, joined.learned
        for place, message in enumerate(messages):
            if message["role"] == "assistant" and learned[place] and isinstance(message.get("content"), str):
                self._check_end(message["content"], place)
        messages, tools = self._adapted(messages), self._tools(tools)
        done = render_whole(lambda some: self._text(some, tools, {}), messages, learned)
        for example in done.examples:
            self._count_tools(done, messages, tools, "".join(text for text, _ in example))
        return done

    @property
    def end(self) -> str | None:
        """Return the text that a plain answer ends with; None if only the rows can tell."""
        if self.dialect is None:
            return None
        end = self.dialect.style.end
        markers = [match.group() for match in self.reader.marker.finditer(end)]
        return markers[-1] if markers else end

    def notes(self) -> list[str]:
        """Say what a person should know of how the rows were rendered."""
        found = [f"turns of the assistant are rendered with {state}" for state in sorted(self.states)]
        if self.ignores_tools:
            found.append("the chat template leaves out tools of rows, or parts of them: these are counted as leftOut")
        if "strftime_now" in self.reader.template.names:
            found.append(f"the chat template calls the clock, which stands at {CLOCK:%Y-%m-%d %H:%M}")
        if self.reader.template.draws:
            found.append("the chat template draws at random: it always gets the first of what it draws from")
        if self.dialect and self.dialect.opening:
            found.append(
                "the chat template adds nothing for add_generation_prompt: what begins the assistant's turn,"
                f" {self.dialect.opening!r}, is learned with each answer"
            )
        if self.dialect and not self.dialect.style.end.strip():
            found.append(f"the chat template writes no end token: an answer ends with {self.dialect.style.end!r}")
        return found

    def _check_end(self, written: str, place: int) -> None:
        """Check that an answer does not contain what ends it, where that is a text like others.

        Raises:
            TemplateRefusedError: it does.

        """
        end = self.end or ""
        if self.dialect is None or any(token in end for token in self.reader.ends):
            return
        said, plain = written.removeprefix(self.dialect.opening).rstrip(), end.strip()
        while plain and said.endswith(plain):  # to stop at the first of several is right
            said = said.removesuffix(plain).rstrip()
        if end in said:
            raise TemplateRefusedError(
                f"ends an answer with {self._shown(end)}, which is no special token, and message {place + 1} contains"
                " that, so the model would not learn where to stop: write an end token there, such as {{ eos_token }}"
            )

    def _text(self, messages: list[Message], tools: Any, state: dict[str, Any], *, prompt: bool = False) -> str:
        return self.reader.template.render(messages, tools, prompt=prompt, **state)

    def _adapted(self, messages: list[Message]) -> list[Message]:
        return [self._adapted_message(message) for message in messages]

    def _adapted_message(self, message: Message) -> Message:
        if self.dialect and self.dialect.parts and isinstance(message.get("content"), str):
            message = {**message, "content": as_parts(message["content"])}
        if self.dialect and message.get("tool_calls"):
            if self.dialect.json_arguments:
                message = {**message, "tool_calls": [with_json_arguments(call) for call in message["tool_calls"]]}
            if self.dialect.text_content and message.get("content") is None:
                message = {**message, "content": ""}
        return message

    def _tools(self, tools: Any) -> Any:
        return [] if tools is None and self.dialect and self.dialect.empty_tools else tools

    def _continue_thought(self, message: Message, context: str, answered: str) -> str | None:
        """Return the text after a prompt that opens a thought, for a message whose thought the template leaves out."""
        pair = next((pair for pair in THOUGHTS if context.rstrip().endswith(pair[0])), None)
        if pair is None or not isinstance(message.get("content"), str):
            return None
        begin, end = pair
        thought, found, answer = message["content"].rpartition(end)
        if not found:
            reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
            if not isinstance(reasoning, str):
                return None
            thought, answer = f"{reasoning}\n", f"\n\n{message['content']}"
        _, found, tail = answered[self.reader.common(context, answered) :].rpartition(answer.strip())
        if not found:
            return None
        thought = thought.partition(begin)[2] if begin in thought else thought
        continued: str = thought.lstrip("\n") + end + answer.rstrip() + tail
        return continued

    def _ended(
        self,
        messages: list[Message],
        place: int,
        tools: Any,
        state: dict[str, Any],
        context: str,
        written: str,
        answered: str,
    ) -> Turn:
        assert self.dialect is not None
        following = None
        if self.dialect.style.by_next:
            role = "tool" if messages[place].get("tool_calls") else "user"
            more = messages[place + 1 : place + 2] or [self._adapted_message({"role": role, "content": PLACEHOLDER})]
            try:
                longer = self._text([*messages[: place + 1], *more], tools, state)
            except Exception:  # noqa: BLE001 it may want something else next
                longer = ""
            following = longer[len(answered) :] if longer.startswith(answered) else None
        parts = self.reader.split_end(written, following, self.dialect.style)
        if parts is None:
            plain = self._shown(self.end or "")
            raise TemplateRefusedError(
                f"writes no end token after message {place + 1}, where a plain answer ends with {plain}, so the model"
                " would not learn to stop there: write that end after every message of the assistant"
            )
        return Turn(place, context, parts[0], parts[1])

    def _check_shape(self, messages: list[Message], turn: Turn, tools: Any, state: dict[str, Any]) -> None:
        """Check one conversation of each shape: what is learned, against what others say and against marks."""
        known = messages[: turn.message + 1]
        shape = (bool(tools), *((m["role"], *sorted(m), type(m.get("content")).__name__) for m in known))
        if shape in self.shapes or len(self.shapes) >= MOST_SHAPES:
            return
        self.shapes.add(shape)
        if self._has_echoes(known, turn, tools):
            raise TemplateRefusedError(
                f"writes what other messages or the row's tools say into message {turn.message + 1}, which the"
                " assistant is to learn"
            )
        if "endgeneration" in self.reader.template.source:
            self._check_marks(known, turn, tools, state)

    def _has_echoes(self, messages: list[Message], turn: Turn, tools: Any) -> bool:
        """Return whether a turn's text changes with what others say."""
        for others, other_tools in echoes.variants(messages[:-1], tools, self._literals):
            with suppress(Exception):  # a template may look for something in a text
                again, _ = self.turn([*others, messages[-1]], turn.message, other_tools)
                if echoes.is_echo(turn.written, again.written):
                    return True
        return False

    @cached_property
    def _literals(self) -> re.Pattern[str]:
        return echoes.literals_pattern(TemplateWords.of(self.reader.template).literals)

    def _check_marks(self, messages: list[Message], turn: Turn, tools: Any, state: dict[str, Any]) -> None:
        """Compare marks with the text that was found without them, but for white space."""
        assert self.dialect is not None
        template, by_next = self.reader.template, self.dialect.style.by_next
        text, spans = _spans(template.render(messages, tools, marks=True, **state))
        start = len(text) if by_next else text.rfind(turn.written + turn.rest)
        if by_next:
            start -= len(turn.written.removesuffix(self.dialect.style.end))
        header = self.reader.common(text, self._text(messages[:-1], tools, state))
        alone = not any(message["role"] == "assistant" for message in messages[:-1])
        inside = "".join(text[max(begin, start) : end] for begin, end in spans if end > start)
        least = turn.written.removesuffix(self.dialect.style.end) if by_next else turn.written
        if start >= 0 and (
            not squeezed(inside).startswith(squeezed(least))
            or not squeezed(turn.written + turn.rest).startswith(squeezed(inside))
            or (alone and any(begin < header for begin, _ in spans))
        ):
            raise TemplateRefusedError(
                f"marks other text than what the assistant writes as message {turn.message + 1}: {MARKS} must stand"
                f" around all of that, its end {self._shown(self.dialect.style.end)} included, and around nothing else"
            )

    def _difference(self, messages: list[Message], place: int, tools: Any) -> str:
        """Say where prompt and answer differ, in the template's words: nothing of a row is shown."""
        shown = [hidden(message) for message in messages[: place + 1]]
        try:
            context = self._text(shown[:place], tools, {}, prompt=True)
            answered = self._text(shown, tools, {})
        except Exception:  # noqa: BLE001 whatever a template raises
            return f"begins message {place + 1} otherwise than its prompt for the assistant does"
        start = self.reader.common(context, answered)
        return (
            f"ends its prompt for the assistant with {self._shown(context[start:])}, where message {place + 1} has"
            f" {self._shown(answered[start:])}: the model would be asked in another context than it learned in. Give"
            " the assistant's messages reasoning_content, or set a template whose prompt begins as the messages do"
        )

    @staticmethod
    def _shown(text: str) -> str:
        return json.dumps(text[:QUOTED] + ("…" if len(text) > QUOTED else ""), ensure_ascii=False)


def _joined(turns: list[Turn], end: str) -> Iterator[Example]:
    """Join turns whose context begins with the turn before as it was written."""
    example: Example = []
    so_far, rest = "", ""
    for turn in turns:
        if example and turn.context.startswith(so_far):
            example.append((turn.context[len(so_far) :], False))
        else:
            if example:
                yield [*example, (rest, False)]
            example = [(turn.context, False)]
        # The end is a text of its own: it has the same tokens after every answer, also where it is no token itself.
        example += [(turn.written.removesuffix(end), True), (turn.written[len(turn.written.removesuffix(end)) :], True)]
        so_far, rest = turn.context + turn.written, turn.rest
    yield [*example, (rest, False)]


def _spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and what they stood around."""
    text, spans, starts = "", [], []
    for part in re.split(f"([{MARK_START}{MARK_STOP}])", marked):
        if part == MARK_START:
            starts.append(len(text))
        elif part == MARK_STOP and starts:
            begin = starts.pop()
            if not starts:
                spans.append((begin, len(text)))
        else:
            text += part
    return text, spans
