"""Fields of the inputs: the base model and the rows."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field, StringConstraints

from qlora_api.base import Model, Rule, decimal
from qlora_api.spec.values import Column, Name, Source


class ModelSpec(Model):
    """The base model. It is frozen: only the adapter learns."""

    source: Source
    """Location of the base model: hf://org/name@revision, s3://bucket/key, gs://…, az://…, pvc://claim/path, or a local
    folder with 'qlora run'. Safetensors only; repositories that bring code are refused."""
    credentials: Name | None = None
    """Secret in the job's namespace with the source's credentials under their usual names (AWS_…, HF_TOKEN …). All
    Secrets of a job are merged into one environment, in the order model, dataset.train, output, tracking. If a key
    occurs twice, the later Secret wins. May be changed while the job runs: the next attempt takes the new one."""
    exchangeable: ClassVar = ("credentials",)


class DatasetFormat(StrEnum):
    TEXT = "Text"
    MESSAGES = "Messages"
    PROMPT_COMPLETION = "PromptCompletion"
    INSTRUCTION = "Instruction"


REQUIRED_COLUMNS = {
    DatasetFormat.MESSAGES: ("messages",),
    DatasetFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DatasetFormat.INSTRUCTION: ("instruction", "output"),
    DatasetFormat.TEXT: ("text",),
}
"""Columns that every row must have, by their fields in :class:`Columns`; the order is that of recognition."""


class LossOn(StrEnum):
    ALL = "All"
    COMPLETION = "Completion"
    ASSISTANT = "Assistant"


class LongRows(StrEnum):
    FAIL = "Fail"
    TRUNCATE = "Truncate"
    DROP = "Drop"


class Columns(Model):
    """Names of the dataset's columns; only those of the chosen format are read."""

    text: Column = "text"
    """Text: the training text."""
    messages: Column = "messages"
    """Messages: a list of {role, content}."""
    tools: Column = "tools"
    """Messages, and PromptCompletion of conversations: the tools that the chat template is given; the column may be
    missing."""
    system: Column = "system"
    """Messages, and PromptCompletion of conversations: a text that is put first as the system message, unless the
    conversation has one; the column may be missing."""
    prompt: Column = "prompt"
    """PromptCompletion: the prompt, a text or a list of messages."""
    completion: Column = "completion"
    """PromptCompletion: the text or the list of messages to learn."""
    instruction: Column = "instruction"
    """Instruction: the task."""
    input: Column = "input"
    """Instruction: the optional context; the column may be missing."""
    output: Column = "output"
    """Instruction: the text to learn."""


class DatasetSource(Model):
    source: Source
    """A JSON, CSV, Parquet or Arrow file, a folder of them, or a folder written by datasets.save_to_disk."""
    credentials: Name | None = None
    """Secret in the job's namespace with the source's credentials under their usual names (AWS_…, HF_TOKEN …). All
    Secrets of a job are merged into one environment, in the order model, dataset.train, output, tracking. If a key
    occurs twice, the later Secret wins. May be changed while the job runs: the next attempt takes the new one."""
    exchangeable: ClassVar = ("credentials",)


class EvaluationData(Model):
    """Rows held out for evaluation: an own source, or a fraction of the training rows."""

    source: Source | None = None
    """Own evaluation rows, in the same format as the training rows."""
    fraction: decimal(0, 0.5, low_included=False) | None = None  # type: ignore[valid-type]
    """Share of the training rows held out, chosen by training.seed."""
    rules: ClassVar = (
        Rule(
            "has(self.source) != has(self.fraction)",
            "set exactly one of source (own rows) and fraction (share of the training rows)",
            "fraction",
            lambda e: (e.source is None) != (e.fraction is None),
        ),
    )


class Tolerance(Model):
    """Shares of the rows above which Prepare ends the job, before a GPU is held. Unset: any share is taken."""

    truncated: decimal(0, 1) | None = None  # type: ignore[valid-type]
    """Share of rows that longRows Truncate may shorten."""
    dropped: decimal(0, 1) | None = None  # type: ignore[valid-type]
    """Share of rows that longRows Drop may leave out because they are too long."""
    fully_masked: decimal(0, 1) | None = None  # type: ignore[valid-type]
    """Share of rows that may be left out because none of their tokens count in the loss."""
    left_out: decimal(0, 1) | None = None  # type: ignore[valid-type]
    """Share of rows in which the chat template or the tokenizer drops a text, or the assistant's answer is empty. Such
    answers are not learned."""
    duplicates: decimal(0, 1) | None = None  # type: ignore[valid-type]
    """Share of training rows that have the same tokens as an earlier one."""
    eval_in_train: decimal(0, 1) | None = None  # type: ignore[valid-type]
    """Share of evaluation rows that are also training rows."""


class DatasetSpec(Model):
    """Training and evaluation rows, and the tokens that count in the loss."""

    train: DatasetSource
    """The training rows."""
    eval: EvaluationData | None = None
    """Evaluation rows. Without them there is no eval loss and no early stopping."""
    format: DatasetFormat
    """Text, Messages (chat), PromptCompletion or Instruction (instruction, input, output)."""
    columns: Columns = Columns()
    chat_template: Annotated[str, StringConstraints(min_length=1, max_length=32768)] | None = None
    """Jinja template for conversations; default: the tokenizer's own. The assistant's
    tokens, including the end token, are found by rendering turn by turn; {% generation %} blocks must mark the same
    tokens."""
    loss_on: LossOn | None = None
    """Tokens that count: All, Completion (PromptCompletion and Instruction) or Assistant (Messages).
    Default: All for Text, Assistant for Messages, else Completion."""
    max_length: int = Field(2048, ge=16, le=1048576)
    """Longest sequence in tokens; with packing also the length of a pack."""
    long_rows: LongRows = LongRows.FAIL
    """A row longer than maxLength ends the job (Fail), loses its tail (Truncate) or is left out (Drop)."""
    packing: bool = True
    """Pack several rows into one sequence of maxLength, with attention masked between them."""
    tolerance: Tolerance = Tolerance()
    """Largest shares, 0 to 1, of the rows that may be lost or repeated; above them the job ends in Prepare."""
    rules: ClassVar = (
        Rule(
            "!has(self.lossOn) || self.lossOn == 'All' || (self.lossOn == 'Assistant') == (self.format == 'Messages')",
            "lossOn Assistant requires format Messages; Completion requires PromptCompletion or Instruction; "
            "All is valid with every format",
            "lossOn",
            lambda d: (
                d.loss_on in (None, LossOn.ALL)
                or (d.loss_on is LossOn.ASSISTANT) == (d.format is DatasetFormat.MESSAGES)
            ),
        ),
        Rule(
            "!has(self.lossOn) || self.lossOn == 'All' || self.format != 'Text'",
            "format Text has no completion: lossOn must be All",
            "lossOn",
            lambda d: d.loss_on in (None, LossOn.ALL) or d.format is not DatasetFormat.TEXT,
        ),
        Rule(
            "!has(self.chatTemplate) || self.format == 'Messages' || self.format == 'PromptCompletion'",
            "chatTemplate requires format Messages or PromptCompletion",
            "chatTemplate",
            lambda d: d.chat_template is None or d.format in (DatasetFormat.MESSAGES, DatasetFormat.PROMPT_COMPLETION),
        ),
        Rule(
            "!has(self.tolerance.evalInTrain) || has(self.eval)",
            "tolerance.evalInTrain needs evaluation rows: set dataset.eval",
            "tolerance.evalInTrain",
            lambda d: d.tolerance.eval_in_train is None or d.eval is not None,
        ),
    )

    @property
    def effective_loss_on(self) -> LossOn:
        """``loss_on`` with its default by format."""
        if self.loss_on is not None:
            return self.loss_on
        by_format = {DatasetFormat.TEXT: LossOn.ALL, DatasetFormat.MESSAGES: LossOn.ASSISTANT}
        return by_format.get(self.format, LossOn.COMPLETION)

    @property
    def required_columns(self) -> dict[str, str]:
        """Columns that every row of the format must have, each with the manifest's field that names it."""
        names = REQUIRED_COLUMNS[self.format]
        return {getattr(self.columns, name): f"spec.dataset.columns.{name}" for name in names}
