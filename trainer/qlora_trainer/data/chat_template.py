"""Chat templates: conversations to text, and which of its characters the assistant wrote.

The assistant's part is found in characters, not in tokens: tokens of a prefix need not be a prefix of the tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_trainer.data.text_pieces import Piece
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FIELD = "spec.dataset.chatTemplate"
MESSAGES_FIELD = "spec.dataset.columns.messages"
MARKS = "{% generation %} … {% endgeneration %}"

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template can raise: jinja's own, and Python's from the expressions in it."""

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, or the manifest's in place of it."""

    tokenizer: PreTrainedTokenizerBase
    override: str | None

    @cached_property
    def source(self) -> str:
        """The template that is used.

        Raises:
            UserError: neither the manifest nor the tokenizer has one.

        """
        if self.override is not None:
            return self.override
        try:
            template: str = self.tokenizer.get_chat_template()
        except ValueError:
            raise UserError(
                TEMPLATE_FIELD,
                None,
                "is needed: the model's tokenizer has no chat template. Set one that goes with the model (most base"
                " models have none; that of the instruction-tuned sibling is a good start), or use format"
                " PromptCompletion or Text",
            ) from None
        return template

    def require_usable(self) -> None:
        """Raise UserError unless there is a template that parses, and offsets to find the assistant's tokens with."""
        if not self.tokenizer.is_fast:
            raise UserError(
                "spec.model.source",
                None,
                "must have a tokenizer.json for format Messages: its tokenizer does not tell which characters a token"
                " stands for; use another model, or format PromptCompletion",
            )
        try:
            self._render([{"role": "user", "content": "a"}])
        except jinja2.TemplateSyntaxError as error:
            raise UserError(TEMPLATE_FIELD, None, f"{self._whose} does not parse: {error}") from error
        except _TEMPLATE_ERRORS:
            return  # it may not like this conversation; those of the rows decide

    def render(self, value: Any, number: int, *, everything: bool) -> Piece:
        """Write one conversation as text, with the parts that count.

        Args:
            value: list of {role, content, …}, or the same as JSON text (a CSV cell).
            number: of the row, from 1, for errors.
            everything: all of it counts, not only what the assistant wrote.

        Raises:
            UserError: not a conversation, a template that fails on it, or one that hides what the assistant wrote.

        """
        messages = _conversation(value, number)
        try:
            if everything:
                return Piece.all(self._render(messages)[0])
            if _GENERATION.search(self.source):
                text, spans = self._render(messages, marks=True)
            else:
                text, spans = self._turn_by_turn(messages, number)
        except _TEMPLATE_ERRORS as error:
            raise UserError(
                TEMPLATE_FIELD, None, f"{self._whose} fails on row {number}: {type(error).__name__}: {error}"
            ) from error
        return Piece(text, tuple((start, stop) for start, stop in spans if start < stop))

    def ask(self, text: str) -> str:
        """A conversation in which the user has said ``text``, and the assistant is to begin.

        Raises:
            UserError: the template fails on it.

        """
        try:
            return self._render([{"role": "user", "content": text}], generation_prompt=True)[0]
        except _TEMPLATE_ERRORS as error:
            raise UserError(
                TEMPLATE_FIELD,
                None,
                f"{self._whose} fails on a prompt: {type(error).__name__}: {error}",
            ) from error

    @property
    def _whose(self) -> str:
        return "the model's own template" if self.override is None else "this template"

    def _turn_by_turn(self, messages: list[Message], number: int) -> tuple[str, list[Span]]:
        """Take what a turn adds to the text for what the assistant wrote, if the text before stays as it is."""
        text = self._render(messages)[0]
        spans = []
        for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            if turn == 0:
                raise self._hidden(number, "which starts with the assistant, so there is no text before it")
            before = self._render(messages[:turn], generation_prompt=True)[0]
            after = text if turn == len(messages) - 1 else self._render(messages[: turn + 1])[0]
            if not (after.startswith(before) and text.startswith(after)):
                raise self._hidden(number, f"where message {turn + 1} changes the text before or after it")
            spans.append((len(before), len(after)))
        return text, spans

    def _hidden(self, number: int, why: str) -> UserError:
        return UserError(
            TEMPLATE_FIELD,
            None,
            f"must mark the assistant's tokens with {MARKS}: they cannot be found by rendering turn by turn in row"
            f" {number}, {why}. Copy {self._whose}, add the marks around what the assistant writes, its end token"
            " included, or set spec.dataset.lossOn to All",
        )

    def _render(
        self, messages: list[Message], *, generation_prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        # The function behind tokenizer.apply_chat_template, which does not give the marks' characters away.
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.source,
            add_generation_prompt=generation_prompt,
            return_assistant_tokens_mask=marks,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], spans[0] if marks else []


def _conversation(value: Any, number: int) -> list[Message]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise _not_messages(number, "text that is not JSON") from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _not_messages(number, "nothing" if not value else type(value).__name__)
    return [_message(message, number, place) for place, message in enumerate(value, start=1)]


def _message(value: Any, number: int, place: int) -> Message:
    if not isinstance(value, dict):
        raise _not_messages(number, f"{type(value).__name__} as message {place}")
    message: Message = _without_none(value)
    if not isinstance(message.get("role"), str):
        raise _not_messages(number, f"a message {place} without a role (its keys are {_keys(message)})")
    if not isinstance(message.get("content"), (str, list)) and "tool_calls" not in message:
        raise _not_messages(number, f"a message {place} without content (its keys are {_keys(message)})")
    return message


def _without_none(value: Any) -> Any:
    """Arrow gives every struct all keys of its column, None where the row had none; templates ask "is defined"."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def _keys(message: Message) -> str:
    return ", ".join(message) or "none"


def _not_messages(number: int, found: str) -> UserError:
    return UserError(
        MESSAGES_FIELD,
        None,
        f'must hold a list of messages such as {{"role": "user", "content": "…"}} in every row; row {number} holds'
        f" {found}",
    )
