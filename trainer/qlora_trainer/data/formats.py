r"""From a row to tokens, and which of them count for the loss.

Every format becomes :class:`Piece`\ s first, texts that are tokenized apart, so that the four differ in nothing but
how they are written. Prompt and answer are two pieces: at generation the model is given the tokens of the prompt alone,
and a merge over the boundary ("(" + ")" → "()") would be a token that it can never be given or asked for. What follows
a prompt is tokenized as in the midst of a text: where a tokenizer puts a space before every text, as Llama 2's, the
answer has none of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, assert_never

from qlora_api.spec import Columns, DatasetFormat, DatasetSpec, LongRows, LossOn
from qlora_trainer.data.chat_template import ChatTemplate, RenderedRow
from qlora_trainer.data.rows.conversation import (
    Conversation,
    is_json_messages,
    json_type,
    read_conversation,
    read_exchange,
)
from qlora_trainer.data.rows.remarks import (
    HALF_AN_EXCHANGE,
    OTHER_ROLES,
    SYSTEM_UNUSED,
    TOOLS_UNUSED,
    UNREAD_KEY,
    UNWRITTEN,
)
from qlora_trainer.data.rows.roles import other_roles, unread_keys
from qlora_trainer.data.text_pieces import Piece, is_blank
from qlora_trainer.data.text_tokens import TextTokens
from qlora_trainer.data.vocabulary_gaps import VocabularyGaps
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from qlora_trainer.data.rows.place import RowNumber

INSTRUCTION_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
INSTRUCTION_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""Taori et al. 2023 (Stanford Alpaca), ``train.py``; the output follows directly, then the end token."""


FUNCTIONS = "functions"
"""Column of OpenAI's rows before there were tools."""


@dataclass(frozen=True)
class Encoded:
    """One example."""

    input_ids: list[int]
    targets: list[bool]
    """As long as ``input_ids``; True: this token is to be predicted."""
    truncated: bool
    """The tail beyond ``maxLength`` was cut off."""
    full_length: int
    """Tokens before anything was cut off."""


@dataclass(frozen=True)
class EncodedRow:
    """The examples of one row: one, or several where a chat template rewrites earlier turns, or none."""

    examples: list[Encoded]
    left_out: int = 0
    """Messages of which the chat template leaves something out."""
    empty: int = 0
    """Messages of the assistant of which nothing is written; they are not learned."""
    tools: bool = False
    """There are tools, and the chat template writes them."""
    remarks: tuple[str, ...] = ()
    """Remarks on the row for its author; see :mod:`qlora_trainer.data.rows.remarks`."""


def needed_columns(dataset: DatasetSpec) -> tuple[dict[str, str], tuple[str, ...]]:
    """List (column → the manifest's field that names it, columns that may be missing) of the dataset's format."""
    optional = {
        DatasetFormat.MESSAGES: (dataset.columns.tools, dataset.columns.system, FUNCTIONS),
        DatasetFormat.PROMPT_COMPLETION: (dataset.columns.tools, dataset.columns.system, FUNCTIONS),
        DatasetFormat.INSTRUCTION: (dataset.columns.input,),
    }.get(dataset.format, ())
    return dataset.required_columns, optional


def render_instruction(row: Mapping[str, Any], columns: Columns, number: RowNumber = 1) -> str:
    """Write the prompt of an Instruction row, in training and in generation.

    Args:
        row: the row's cells by column.
        columns: the dataset's column names; ``input`` may be missing, None or blank.
        number: of the row, from 1, for the error.

    Raises:
        UserError: the instruction, or an input that is there, is not text.

    """
    instruction = _text(row, columns, "instruction", number)
    context = "" if row.get(columns.input) is None else _text(row, columns, "input", number)
    if context.strip():
        return INSTRUCTION_WITH_INPUT.format(instruction=instruction, input=context)
    return INSTRUCTION_ALONE.format(instruction=instruction)


@dataclass(frozen=True)
class Encoder:
    """Turns rows of one dataset into tokens of one tokenizer. Has no state.

    Raises:
        UserError: at construction: Messages without a chat template or with one that does not parse, or a tokenizer
            without an end token.

    """

    tokenizer: PreTrainedTokenizerBase
    dataset: DatasetSpec
    conversations: bool | None = None
    """PromptCompletion: all rows are conversations, so that a prompt is a turn of the user; or none is. None if each
    row may be either."""

    def __post_init__(self) -> None:
        if self.dataset.format is DatasetFormat.MESSAGES:
            _ = self._chat.end  # refuses a template that does not parse before any row
        elif self.tokenizer.eos_token_id is None:
            raise UserError(
                "spec.model.source",
                None,
                "its tokenizer has no end token (eos_token in tokenizer_config.json), so a model trained on"
                f" {self.dataset.format} rows would never stop; add one, or use format Messages with a template",
            )

    def encode(self, row: Mapping[str, Any], number: RowNumber = 1) -> Encoded:
        """Encode one row that gives one example, or none; see :meth:`encode_batch`."""
        examples = self.encode_batch([row], [number])[0].examples
        assert len(examples) <= 1, "the row gives several examples"
        return examples[0] if examples else Encoded([], [], truncated=False, full_length=0)

    def encode_batch(
        self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[RowNumber] | None = None
    ) -> list[EncodedRow]:
        """Encode rows together: the tokenizer works on all cores within one call.

        An example longer than ``maxLength`` loses its tail under longRows Truncate and is whole otherwise.

        Args:
            rows: cells by column.
            numbers: of the rows, for errors; from 1 where they have none.

        Raises:
            UserError: names the row and the field.

        """
        numbers = range(1, len(rows) + 1) if numbers is None else numbers
        conversations = [self._conversation(row, number) for row, number in zip(rows, numbers, strict=True)]
        rendered = self._render(rows, numbers, conversations)
        ids = iter(
            self._tokens.of_pieces(
                [
                    (piece.text, at == 0)
                    for row in rendered
                    for example in row.examples
                    for at, piece in enumerate(example)
                ]
            )
        )
        return [
            self._encoded_row(row, ids, self._remarks(given, conversation))
            for row, given, conversation in zip(rendered, rows, conversations, strict=True)
        ]

    def _encoded_row(self, row: RenderedRow, ids: Iterator[list[int]], remarks: tuple[str, ...]) -> EncodedRow:
        """Make a row of its examples' texts, whose tokens come next from ``ids``."""
        encoded, gaps, silent = [], False, 0
        for example in row.examples:
            pieces = [next(ids) for _ in example]
            targets = self._gaps.targets(example, pieces)
            encoded.append(self._assemble(pieces, targets.of_pieces, templated=row.templated))
            gaps, silent = gaps or targets.gaps, silent + targets.silent
        if gaps:
            remarks = (*remarks, UNWRITTEN)
        return EncodedRow(encoded, row.left_out + gaps, row.empty + silent, row.tools, remarks)

    @cached_property
    def _tokens(self) -> TextTokens:
        return TextTokens(self.tokenizer)

    @cached_property
    def _gaps(self) -> VocabularyGaps:
        token = self.tokenizer.unk_token_id
        unknown = None if token is None else (token, str(self.tokenizer.unk_token))
        return VocabularyGaps(
            self._tokens.of_texts, self.tokenizer.decode, unknown, list(self.tokenizer.get_added_vocab())
        )

    def prompt(self, text: str) -> list[int]:
        """Return the prompt for ``text``, in the form that was taught: a turn, an instruction, a prompt, a beginning.

        Raises:
            UserError: the chat template fails on it.

        """
        if self._is_chat:
            text = self._chat.ask(text)
        elif self.dataset.format is DatasetFormat.INSTRUCTION:
            columns = self.dataset.columns
            text = render_instruction({columns.instruction: text}, columns)
        [ids] = self._tokens.of_texts([text])
        return ids if self._is_chat else self._tokens.begun(ids)

    def beginnings(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts, whatever the dataset's format, with those that stand first."""
        return [self._tokens.begun(ids) for ids in self._tokens.of_texts(texts)]

    @property
    def chat_template(self) -> str:
        """The template that Messages are rendered with: the manifest's, else the tokenizer's."""
        return self._chat.source

    @property
    def end(self) -> tuple[int, ...]:
        """The tokens that an answer ends with, as they are learned."""
        if self._is_chat and (text := self._chat.end):
            return tuple(self._tokens.of_pieces([(text, False)])[0])
        end = self.tokenizer.eos_token_id
        return () if end is None else (end,)

    def notes(self) -> list[str]:
        """Return what a person should know of how the rows before were encoded."""
        return self._chat.notes() if self._is_chat else []

    @property
    def _is_chat(self) -> bool:
        return bool(self.conversations) or self.dataset.format is DatasetFormat.MESSAGES

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.dataset.chat_template)

    @property
    def _everything(self) -> bool:
        return self.dataset.effective_loss_on is LossOn.ALL

    def _render(
        self,
        rows: Sequence[Mapping[str, Any]],
        numbers: Sequence[RowNumber],
        conversations: Sequence[Conversation | None],
    ) -> list[RenderedRow]:
        """Write rows as texts: the conversations among them together, for a child has to do it."""
        given = [(c, number) for c, number in zip(conversations, numbers, strict=True) if c is not None]
        templated = iter(
            self._chat.render([c for c, _ in given], [n for _, n in given], everything=self._everything)
            if given
            else ()
        )
        return [
            self._rendered(row, number) if conversation is None else next(templated)
            for row, number, conversation in zip(rows, numbers, conversations, strict=True)
        ]

    def _conversation(self, row: Mapping[str, Any], number: RowNumber) -> Conversation | None:
        """The row as a conversation, where it is one."""
        columns = self.dataset.columns
        tools = row.get(columns.tools)
        if self.dataset.format is DatasetFormat.MESSAGES:
            found = read_conversation(row.get(columns.messages), tools, number, "spec.dataset.columns.messages")
        elif self.dataset.format is DatasetFormat.PROMPT_COMPLETION and self._is_exchange(row, number):
            fields = ("spec.dataset.columns.prompt", "spec.dataset.columns.completion")
            found = read_exchange(row.get(columns.prompt), row.get(columns.completion), tools, number, fields)
        else:
            return None
        found = found if columns.tools == FUNCTIONS else found.with_functions(row.get(FUNCTIONS))
        return found.with_system(row.get(columns.system), columns.system)

    def _is_exchange(self, row: Mapping[str, Any], number: RowNumber) -> bool:
        found = is_exchange(row, self.dataset.columns)
        if self.conversations is None or found is self.conversations:
            return found
        kinds = "messages", "text"
        this, first = kinds if found else reversed(kinds)
        raise UserError(
            "spec.dataset.columns.prompt",
            self.dataset.columns.prompt,
            f"and {self.dataset.columns.completion} must hold texts in all rows, or lists of messages in all; row"
            f" {number} holds {this}, where the first row holds {first}",
        )

    def _remarks(self, row: Mapping[str, Any], conversation: Conversation | None) -> tuple[str, ...]:
        columns = self.dataset.columns
        if conversation is None:
            if self.dataset.format is not DatasetFormat.PROMPT_COMPLETION:
                return ()
            half = any(is_json_messages(row.get(column)) for column in (columns.prompt, columns.completion))
            tools = [TOOLS_UNUSED.format(column=name) for name in (columns.tools, FUNCTIONS) if row.get(name)]
            unused = [SYSTEM_UNUSED.format(column=columns.system)] if row.get(columns.system) else []
            return (*([HALF_AN_EXCHANGE] if half else []), *unused, *tools)
        keys = unread_keys(conversation.messages, self._chat.names)
        other = not self._everything and other_roles(conversation.messages, self._chat.source)
        return (
            *conversation.remarks,
            *([OTHER_ROLES] if other else []),
            *(UNREAD_KEY.format(key=key) for key in keys),
        )

    def _rendered(self, row: Mapping[str, Any], number: RowNumber) -> RenderedRow:
        pieces = self._pieces(row, number)
        return RenderedRow([pieces], empty=int(not pieces[-1].counts), templated=False)

    def _pieces(self, row: Mapping[str, Any], number: RowNumber) -> list[Piece]:
        columns = self.dataset.columns
        match self.dataset.format:
            case DatasetFormat.TEXT:
                text = _text(row, columns, "text", number)
                return [Piece(text, counts=not is_blank(text))]
            case DatasetFormat.PROMPT_COMPLETION:
                prompt = _text(row, columns, "prompt", number)
                completion = _text(row, columns, "completion", number)
            case DatasetFormat.INSTRUCTION:
                prompt = render_instruction(row, columns, number)
                completion = _text(row, columns, "output", number)
            case DatasetFormat.MESSAGES:
                raise AssertionError("rows of Messages are conversations, which the chat template renders")
            case _:
                assert_never(self.dataset.format)
        return [Piece(prompt, self._everything), Piece(completion, counts=not is_blank(completion))]

    def _assemble(self, pieces: list[list[int]], of_pieces: list[list[bool]], *, templated: bool) -> Encoded:
        ids = [token for tokens in pieces for token in tokens]
        targets = [counts for of_piece in of_pieces for counts in of_piece]
        if not templated:  # a chat template writes its own begin and end
            begun = self._tokens.begun(ids)
            ids, targets = begun, [self._everything and any(targets)] * (len(begun) - len(ids)) + targets
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                # a blank completion is no lesson: it and its end would teach the model to be silent
                ids, targets = [*ids, self.tokenizer.eos_token_id], [*targets, any(of_pieces[-1])]
        length, most = len(ids), self.dataset.max_length
        if length > most and self.dataset.long_rows is LongRows.TRUNCATE:
            return Encoded(ids[:most], targets[:most], truncated=True, full_length=length)
        return Encoded(ids, targets, truncated=False, full_length=length)


def is_exchange(row: Mapping[str, Any], columns: Columns) -> bool:
    """Return whether prompt and completion are lists of messages, or the same as JSON text, rather than texts."""
    return all(
        isinstance(cell, (list, dict)) or is_json_messages(cell)
        for cell in (row.get(columns.prompt), row.get(columns.completion))
    )


def _text(row: Mapping[str, Any], columns: Columns, name: str, number: RowNumber) -> str:
    column = getattr(columns, name)
    value = row.get(column)
    if isinstance(value, str):
        return value
    raise UserError(
        f"spec.dataset.columns.{name}",
        column,
        f"must hold text in every row; row {number} holds {json_type(value)}",
    )
