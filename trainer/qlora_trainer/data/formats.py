r"""From a row to tokens, and which of them count for the loss.

Every format becomes :class:`Piece`\ s first, texts that are tokenized apart, so that the four differ in nothing but
how they are written. Prompt and completion are two pieces: at generation the model is given the tokens of the prompt
alone, and a merge over the boundary ("(" + ")" → "()") would be a token that it can never be given or asked for.
Tokenizers that put a space before every text, as Llama 2's, put one before the completion too; decoding the answer
alone takes it off again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from qlora_api.spec import Columns, DatasetFormat, DatasetSpec, LongRows, LossOn
from qlora_trainer.data.chat_template import ChatTemplate
from qlora_trainer.data.rows.conversation import json_type, read_conversation, read_exchange
from qlora_trainer.data.text_pieces import Piece
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


@dataclass(frozen=True)
class Encoded:
    """One row."""

    input_ids: list[int]
    targets: list[bool]
    """As long as ``input_ids``; True: this token is to be predicted."""
    truncated: bool
    """The tail beyond ``maxLength`` was cut off."""
    full_length: int
    """Tokens before anything was cut off."""


def needed_columns(dataset: DatasetSpec) -> tuple[dict[str, str], tuple[str, ...]]:
    """List (column → the manifest's field that names it, columns that may be missing) of the dataset's format."""
    needed = {
        DatasetFormat.TEXT: ("text",),
        DatasetFormat.MESSAGES: ("messages",),
        DatasetFormat.PROMPT_COMPLETION: ("prompt", "completion"),
        DatasetFormat.INSTRUCTION: ("instruction", "output"),
    }[dataset.format]
    optional = {
        DatasetFormat.MESSAGES: (dataset.columns.tools,),
        DatasetFormat.PROMPT_COMPLETION: (dataset.columns.tools,),
        DatasetFormat.INSTRUCTION: (dataset.columns.input,),
    }.get(dataset.format, ())
    return {getattr(dataset.columns, name): f"spec.dataset.columns.{name}" for name in needed}, optional


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

    def __post_init__(self) -> None:
        if self.dataset.format is DatasetFormat.MESSAGES:
            self._usable_chat  # noqa: B018 refuses before any row
        elif self.tokenizer.eos_token_id is None:
            raise UserError(
                "spec.model.source",
                None,
                "its tokenizer has no end token (eos_token in tokenizer_config.json), so a model trained on"
                f" {self.dataset.format} rows would never stop; add one, or use format Messages with a template",
            )

    def encode(self, row: Mapping[str, Any], number: RowNumber = 1) -> Encoded:
        """Encode one row; see :meth:`encode_batch`."""
        return self.encode_batch([row], [number])[0]

    def encode_batch(
        self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[RowNumber] | None = None
    ) -> list[Encoded]:
        """Encode rows together: the tokenizer works on all cores within one call.

        A row longer than ``maxLength`` loses its tail under longRows Truncate and is returned whole otherwise.

        Args:
            rows: cells by column.
            numbers: of the rows, for errors; from 1 where they have none.

        Raises:
            UserError: names the row and the field.

        """
        numbers = range(1, len(rows) + 1) if numbers is None else numbers
        pieces = [self._pieces(row, number) for row, number in zip(rows, numbers, strict=True)]
        flat = iter(self._tokenize([piece for row in pieces for piece in row]))
        return [self._assemble([next(flat) for _ in row], templated=row[0].templated) for row in pieces]

    def prompt(self, text: str) -> list[int]:
        """Return the prompt for ``text``, in the form that was taught: a turn, an instruction, a prompt, a beginning.

        Raises:
            UserError: the chat template fails on it.

        """
        match self.dataset.format:
            case DatasetFormat.MESSAGES:
                text = self._chat.ask(text)
            case DatasetFormat.INSTRUCTION:
                columns = self.dataset.columns
                text = render_instruction({columns.instruction: text}, columns)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.dataset.format is not DatasetFormat.MESSAGES and ids[:1] != self._begin:
            ids = self._begin + ids
        return ids

    @property
    def chat_template(self) -> str:
        """The template that Messages are rendered with: the manifest's, else the tokenizer's."""
        return self._chat.source

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.dataset.chat_template)

    @cached_property
    def _usable_chat(self) -> ChatTemplate:
        self._chat.require_usable()
        return self._chat

    @cached_property
    def _begin(self) -> list[int]:
        """The begin token, if the tokenizer itself puts one before a text."""
        bos = self.tokenizer.bos_token_id
        starts_with_bos = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        return [bos] if starts_with_bos else []

    def _pieces(self, row: Mapping[str, Any], number: RowNumber) -> tuple[Piece, ...]:
        columns = self.dataset.columns
        everything = self.dataset.effective_loss_on is LossOn.ALL
        match self.dataset.format:
            case DatasetFormat.TEXT:
                return (Piece.all(_text(row, columns, "text", number)),)
            case DatasetFormat.MESSAGES:
                conversation = read_conversation(
                    row.get(columns.messages), row.get(columns.tools), number, "spec.dataset.columns.messages"
                )
                return (self._usable_chat.render(conversation, number, everything=everything),)
            case DatasetFormat.PROMPT_COMPLETION if _is_exchange(row, columns):
                fields = ("spec.dataset.columns.prompt", "spec.dataset.columns.completion")
                conversation = read_exchange(
                    row.get(columns.prompt), row.get(columns.completion), row.get(columns.tools), number, fields
                )
                return (self._usable_chat.render(conversation, number, everything=everything),)
            case DatasetFormat.PROMPT_COMPLETION:
                prompt = _text(row, columns, "prompt", number)
                completion = _text(row, columns, "completion", number)
            case DatasetFormat.INSTRUCTION:
                prompt = render_instruction(row, columns, number)
                completion = _text(row, columns, "output", number)
        return (Piece.all(prompt) if everything else Piece.none(prompt), Piece.all(completion))

    def _tokenize(self, pieces: Sequence[Piece]) -> list[tuple[list[int], list[bool]]]:
        offsets_needed = any(piece.partial for piece in pieces)
        encodings = self.tokenizer(
            [piece.text for piece in pieces],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets_needed,
            verbose=False,  # of rows longer than the model: maxLength is what counts here
        )
        ids: list[list[int]] = encodings["input_ids"]
        offsets = encodings["offset_mapping"] if offsets_needed else [[]] * len(pieces)
        return [(i, _targets(piece, len(i), o)) for piece, i, o in zip(pieces, ids, offsets, strict=True)]

    def _assemble(self, pieces: Sequence[tuple[list[int], list[bool]]], *, templated: bool) -> Encoded:
        ids = list(chain.from_iterable(tokens for tokens, _ in pieces))
        targets = list(chain.from_iterable(counts for _, counts in pieces))
        if not templated:  # a chat template writes its own begin and end
            everything = self.dataset.effective_loss_on is LossOn.ALL
            if ids[:1] != self._begin:  # rows that bring the token as text do not get it twice
                ids, targets = self._begin + ids, [everything] * len(self._begin) + targets
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                # an empty completion is no lesson: its end alone would teach the model to be silent
                ids, targets = [*ids, self.tokenizer.eos_token_id], [*targets, any(targets)]
        length, most = len(ids), self.dataset.max_length
        if length > most and self.dataset.long_rows is LongRows.TRUNCATE:
            return Encoded(ids[:most], targets[:most], truncated=True, full_length=length)
        return Encoded(ids, targets, truncated=False, full_length=length)


def _is_exchange(row: Mapping[str, Any], columns: Columns) -> bool:
    """Return whether prompt and completion are lists of messages rather than texts."""
    return isinstance(row.get(columns.prompt), list) and isinstance(row.get(columns.completion), list)


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


def _targets(piece: Piece, length: int, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Decide which of a piece's tokens count.

    Token i covers the characters from the end of token i - 1 (or from its own start, for the later tokens of one
    character) to its own end: byte-level tokenizers report offsets without leading spaces, so that a token of spaces
    alone would cover nothing. A token counts if it covers any character that does.
    """
    if not piece.partial:
        return [bool(piece.spans)] * length
    targets = [False] * length
    ends = [end for _, end in offsets]
    for start, stop in piece.spans:
        last = bisect_left(ends, stop) + 1
        while last < length and offsets[last][0] < stop:
            last += 1
        for token in range(bisect_right(ends, start), min(last, length)):
            targets[token] = True
    return targets
