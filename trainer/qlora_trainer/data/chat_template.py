"""Chat templates: conversations to text, and which of its characters the assistant wrote.

The assistant's part is found in characters, not in tokens: tokens of a prefix need not be a prefix of the tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_trainer.data.text_pieces import Piece
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_trainer.data.rows.conversation import Conversation, Message
    from qlora_trainer.data.rows.place import RowNumber

TEMPLATE_FIELD = "spec.dataset.chatTemplate"
MARKS = "{% generation %} … {% endgeneration %}"

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template can raise: jinja's own, and Python's from the expressions in it."""

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

    def render(self, conversation: Conversation, number: RowNumber, *, everything: bool) -> Piece:
        """Write one conversation as text, with the parts that count.

        Args:
            conversation: of the row.
            number: of the row, for errors.
            everything: all of it counts, not only what the assistant wrote.

        Raises:
            UserError: a template that fails on it, or one that hides what the assistant wrote.

        """
        try:
            if everything:
                text = self._render(conversation.messages, conversation.tools)[0]
                return Piece(text, ((0, len(text)),), templated=True)
            if _GENERATION.search(self.source):
                text, spans = self._marked(conversation, number)
            else:
                text, spans = self._turn_by_turn(conversation, number)
        except _TEMPLATE_ERRORS as error:
            raise UserError(
                TEMPLATE_FIELD, None, f"{self._whose} fails on row {number}: {type(error).__name__}: {error}"
            ) from error
        return Piece(text, tuple((start, stop) for start, stop in spans if start < stop), templated=True)

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

    def _marked(self, conversation: Conversation, number: RowNumber) -> tuple[str, list[Span]]:
        """Take the template's marks; those of messages that are not to be learned are left out."""
        text, spans = self._render(conversation.messages, conversation.tools, marks=True)
        turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if all(conversation.learned[turn] for turn in turns):
            return text, spans
        if len(spans) != len(turns):
            raise UserError(
                TEMPLATE_FIELD,
                None,
                f"{self._whose} marks {len(spans)} parts of the {len(turns)} assistant messages in row {number}, so"
                " those that are not to be learned (weight 0) cannot be told apart: mark each once",
            )
        return text, [span for span, turn in zip(spans, turns, strict=True) if conversation.learned[turn]]

    def _turn_by_turn(self, conversation: Conversation, number: RowNumber) -> tuple[str, list[Span]]:
        """Take what a turn adds to the text for what the assistant wrote, if the text before stays as it is."""
        messages, tools = conversation.messages, conversation.tools
        text = self._render(messages, tools)[0]
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or not conversation.learned[turn]:
                continue
            if turn == 0:
                raise self._hidden(number, "which starts with the assistant, so there is no text before it")
            before = self._render(messages[:turn], tools, generation_prompt=True)[0]
            after = text if turn == len(messages) - 1 else self._render(messages[: turn + 1], tools)[0]
            if not (after.startswith(before) and text.startswith(after)):
                raise self._hidden(number, f"where message {turn + 1} changes the text before or after it")
            spans.append((len(before), len(after)))
        return text, spans

    def _hidden(self, number: RowNumber, why: str) -> UserError:
        return UserError(
            TEMPLATE_FIELD,
            None,
            f"must mark the assistant's tokens with {MARKS}: they cannot be found by rendering turn by turn in row"
            f" {number}, {why}. Copy {self._whose}, add the marks around what the assistant writes, its end token"
            " included, or set spec.dataset.lossOn to All",
        )

    def _render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        # The function behind tokenizer.apply_chat_template, which does not give the marks' characters away.
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.source,
            add_generation_prompt=generation_prompt,
            return_assistant_tokens_mask=marks,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], spans[0] if marks else []
