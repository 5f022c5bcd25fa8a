"""Chat templates: conversations to texts, and which of these the assistant wrote.

A template comes with a model, from somebody else, and is a program: a child with bounds runs it
(:mod:`qlora_trainer.data.rendering.service`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_trainer.bounded_child import BoundedChild, BoundExceededError, ChildBounds
from qlora_trainer.data.text_pieces import Piece
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_trainer.data.rows.conversation import Conversation
    from qlora_trainer.data.rows.place import RowNumber

TEMPLATE_FIELD = "spec.dataset.chatTemplate"
TOGETHER = 32
"""Conversations that a child is given at once."""
BOUNDS = ChildBounds()
_SERVICE = "qlora_trainer.data.rendering.service:serve"


@dataclass(frozen=True)
class RenderedRow:
    """The examples of one conversation."""

    examples: list[list[Piece]]
    """Several where the template rewrites earlier turns."""
    left_out: int = 0
    """Messages of which the template leaves something out."""
    empty: int = 0
    """Messages of the assistant of which nothing is written; they are not learned."""
    tools: bool = False
    """There are tools, and the template writes them."""
    templated: bool = True
    """A template wrote it, begin and end included."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, or the manifest's in place of it."""

    tokenizer: PreTrainedTokenizerBase
    override: str | None
    bounds: ChildBounds = BOUNDS

    @cached_property
    def source(self) -> str:
        """The template that is used; of several that a tokenizer has, the one named ``default``.

        Raises:
            UserError: neither the manifest nor the tokenizer has one.

        """
        if self.override is not None:
            return self.override
        try:
            template: str = self.tokenizer.get_chat_template()
        except ValueError:
            if names := sorted(self._named):
                raise UserError(
                    TEMPLATE_FIELD,
                    None,
                    f"is needed: the model's tokenizer has several chat templates ({', '.join(names)}) and none of them"
                    " is named default. Set the text of the one that is meant",
                ) from None
            raise UserError(
                TEMPLATE_FIELD,
                None,
                "is needed: the model's tokenizer has no chat template. Set one that goes with the model (most base"
                " models have none; that of the instruction-tuned sibling is a good start), or use format"
                " PromptCompletion or Text",
            ) from None
        return template

    @cached_property
    def names(self) -> frozenset[str]:
        """The words in the text of the template, those of messages' keys that it reads among them."""
        return frozenset(re.findall(r"\w+", f"{self.source} {self._tool_source}"))

    @cached_property
    def end(self) -> str | None:
        """Return the text that ends a plain answer; None if only the rows can tell.

        Raises:
            UserError: the template does not parse, or goes beyond its bounds.

        """
        end: str | None = self._answer({"about": True})["end"]
        return end

    def notes(self) -> list[str]:
        """Return what a person should know of how the rows before were rendered."""
        notes: list[str] = self._answer({"about": True})["notes"]
        return notes

    def render(
        self, rows: Sequence[Conversation], numbers: Sequence[RowNumber], *, everything: bool
    ) -> list[RenderedRow]:
        """Write conversations as texts, with the parts that count.

        Args:
            rows: the conversations.
            numbers: of the rows, for errors.
            everything: all of it counts, not only what the assistant wrote; but nothing of ``weight: 0``.

        Raises:
            UserError: a template that fails on a row, or with which a row cannot be learned from.

        """
        done: list[RenderedRow] = []
        for start in range(0, len(rows), TOGETHER):
            some, places = rows[start : start + TOGETHER], numbers[start : start + TOGETHER]
            try:
                done += self._render(some, places, everything=everything)
            except BoundExceededError:
                done += self._one_by_one(some, places, everything=everything)
        return done

    def ask(self, text: str) -> str:
        """Return a conversation in which the user has said ``text``, and the assistant is to begin.

        Raises:
            UserError: the template fails on it.

        """
        answer = self._answer({"prompt": [{"role": "user", "content": text}]})
        self._check(answer, "a prompt")
        asked: str = answer["text"]
        return asked

    @property
    def _named(self) -> dict[str, str]:
        """The tokenizer's templates by name, where it has several."""
        templates = self.tokenizer.chat_template
        return templates if isinstance(templates, dict) else {}

    @property
    def _tool_source(self) -> str | None:
        """Return what transformers renders rows with tools with, where that is another template."""
        return self._named.get("tool_use") if self.override is None else None

    @property
    def _whose(self) -> str:
        return "the model's own template" if self.override is None else "this template"

    @cached_property
    def _child(self) -> BoundedChild:
        variables = {
            name: [str(token) for token in value] if isinstance(value, (list, tuple)) else str(value)
            for name, value in self.tokenizer.special_tokens_map.items()
        }
        setup = {
            "template": self.source,
            "tool_template": self._tool_source,
            "variables": variables,
            "tokens": list(self.tokenizer.get_added_vocab()),
            "special": [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special],
        }
        return BoundedChild(_SERVICE, setup, self.bounds)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._child.call(request)
        except BoundExceededError as error:
            raise UserError(TEMPLATE_FIELD, None, f"{self._whose} {error}") from None
        if "syntax" in answer:
            raise UserError(TEMPLATE_FIELD, None, f"{self._whose} does not parse: {answer['syntax']}")
        return answer

    def _render(
        self, rows: Sequence[Conversation], numbers: Sequence[RowNumber], *, everything: bool
    ) -> list[RenderedRow]:
        given = [
            {
                "messages": row.messages,
                "tools": row.tools,
                "learned": row.weights if everything else row.learned,
                "continued": row.given if row.continues else 0,
            }
            for row in rows
        ]
        answers = self._child.call({"rows": given, "everything": everything})["rows"]
        return [self._row(answer, number) for answer, number in zip(answers, numbers, strict=True)]

    def _row(self, answer: dict[str, Any], number: RowNumber) -> RenderedRow:
        self._check(answer, f"row {number}")
        examples = [[Piece(text, counts) for text, counts in example if text] for example in answer["examples"]]
        return RenderedRow(examples, answer["left_out"], answer["empty"], answer["tools"])

    def _one_by_one(
        self, rows: Sequence[Conversation], numbers: Sequence[RowNumber], *, everything: bool
    ) -> Iterator[RenderedRow]:
        """Find the row that goes beyond the bounds."""
        for row, number in zip(rows, numbers, strict=True):
            try:
                yield from self._render([row], [number], everything=everything)
            except BoundExceededError as error:
                raise UserError(TEMPLATE_FIELD, None, f"{self._whose} {error} for row {number}") from None

    def _check(self, answer: dict[str, Any], what: str) -> None:
        if "failed" in answer:
            raise UserError(TEMPLATE_FIELD, None, f"{self._whose} fails on {what}: {answer['failed']}")
        if "refused" in answer:
            raise UserError(TEMPLATE_FIELD, None, f"{self._whose}, given {what}, {answer['refused']}")
