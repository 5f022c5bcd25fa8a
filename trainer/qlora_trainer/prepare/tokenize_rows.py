"""Tokenize and pack once, before any GPU is held; afterwards every rank maps the same files.

Cached by content: ``<cache>/data/<hash>/`` holds ``train/``, perhaps ``eval/``, and ``receipt.json``. The folder gets
its name by a rename when all is in it, so that a folder that is there is whole.

All cores work without processes of ours: the tokenizer is native code with a thread for each core (counted within the
container's CPU limit), and a process for each core would import transformers again and hold its own copy of the rows.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np

from qlora_api.contract import PrepareReceipt
from qlora_api.spec import DatasetFormat
from qlora_trainer.data.collect import MEDIA, Split, Tally, collect, require_rows
from qlora_trainer.data.formats import Encoder, is_exchange, needed_columns
from qlora_trainer.data.order import permutation
from qlora_trainer.data.packing import Sequences, pack, unpacked
from qlora_trainer.data.rows.errors import shown_columns
from qlora_trainer.data.rows.read import Rows
from qlora_trainer.data.rows.source import find_source
from qlora_trainer.data.tokenized_rows import RowWriter, TokenizedRows, load_sequences, save_sequences
from qlora_trainer.errors import StorageError, UserError
from qlora_trainer.prepare.fingerprint import data_hash
from qlora_trainer.prepare.receipt import samples
from qlora_trainer.storage.fetch import take_name

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from qlora_api.spec import DatasetSpec, QLoRAJobSpec
    from qlora_trainer.data.rows.source import SourceFiles

log = logging.getLogger(__name__)

TRAIN_FIELD = "spec.dataset.train.source"
EVAL_FIELD = "spec.dataset.eval.source"
FRACTION_FIELD = "spec.dataset.eval.fraction"

HOLD_OUT = 1 << 32
"""Stands where the epoch stands in the seeds of the data order; no epoch has this number."""


@dataclass(frozen=True)
class PreparedData:
    """All that training needs to know of the rows."""

    folder: Path
    """Give this to :func:`load_prepared_data` in every rank."""
    train: TokenizedRows
    eval: TokenizedRows | None
    train_packs: Sequences
    eval_packs: Sequences | None
    receipt: PrepareReceipt
    unread_files: tuple[str, ...] = ()
    """Sentences about files of the sources that are not read."""


@dataclass(frozen=True)
class _Tokenized:
    """The sides as written, and one tally for each source."""

    train: Split
    evaluation: Split | None
    tallies: list[Tally]


def prepare_data(
    spec: QLoRAJobSpec,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_hash: str,
    train_path: Path,
    eval_path: Path | None,
    cache_dir: Path,
) -> PreparedData:
    """Tokenize and pack the rows, or find them done.

    Args:
        spec: of the job; only the dataset, ``training.seed`` and the prompts are looked at.
        tokenizer: of the base model.
        tokenizer_hash: names the tokenizer's files.
        train_path: the training rows, on this machine.
        eval_path: the evaluation rows, if they have a source of their own.
        cache_dir: the rows go to ``data/`` in it.

    Raises:
        UserError: something in the manifest or the rows must change.
        StorageError: the cache cannot be written.

    """
    encoder = Encoder(tokenizer, spec.dataset)
    train_source = find_source(train_path, TRAIN_FIELD)
    eval_source = find_source(eval_path, EVAL_FIELD) if eval_path else None
    sources = (train_source, *([eval_source] if eval_source else []))
    unread = tuple(
        f"files of {source.path} that are not read: {files}"
        for source in sources
        if source.selection and (files := source.selection.unread())
    )
    name = data_hash(spec, encoder, tokenizer_hash, train_source, eval_source)
    folder = cache_dir / "data" / name
    if folder.exists():
        prepared = load_prepared_data(folder)
        _check_prompts(spec, replace(encoder, conversations=prepared.receipt.conversations))
        return replace(prepared, unread_files=unread)
    encoder = replace(encoder, conversations=_are_conversations(train_source, spec.dataset))
    _check_prompts(spec, encoder)
    partial = folder.with_name(f".{name}-{uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        receipt = _receipt(name, partial, encoder, _tokenize(spec, encoder, train_source, eval_source, partial))
        (partial / "receipt.json").write_text(receipt.model_dump_json(by_alias=True, indent=2), "utf-8")
        take_name(partial, folder)
    except OSError as error:
        raise StorageError(f"cannot put the tokenized rows into {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(load_prepared_data(folder), unread_files=unread)


def _check_prompts(spec: QLoRAJobSpec, encoder: Encoder) -> None:
    for prompt in spec.training.evaluation.prompts:
        length, most = len(encoder.prompt(prompt)), spec.dataset.max_length
        if not 0 < length < most:
            raise UserError(
                "spec.training.evaluation.prompts",
                prompt,
                f"has {length} tokens; there must be some, and fewer than dataset.maxLength, {most}",
            )


def _are_conversations(source: SourceFiles, dataset: DatasetSpec) -> bool:
    """Return whether prompts and completions are lists of messages; the first row decides."""
    if dataset.format is not DatasetFormat.PROMPT_COMPLETION:
        return False
    first = next(Rows(source, *needed_columns(dataset)).batches(most_rows=1))
    return is_exchange(first.rows[0], dataset.columns)


def load_prepared_data(folder: Path) -> PreparedData:
    """Map what :func:`prepare_data` left in ``folder``; takes milliseconds, and the pages are shared by all ranks."""
    held_out = folder / "eval"
    return PreparedData(
        folder=folder,
        train=TokenizedRows.load(folder / "train"),
        eval=TokenizedRows.load(held_out) if held_out.exists() else None,
        train_packs=load_sequences(folder / "train"),
        eval_packs=load_sequences(held_out) if held_out.exists() else None,
        receipt=PrepareReceipt.model_validate_json((folder / "receipt.json").read_bytes()),
    )


def _tokenize(
    spec: QLoRAJobSpec, encoder: Encoder, train_source: SourceFiles, eval_source: SourceFiles | None, folder: Path
) -> _Tokenized:
    """Write the rows of both sides below ``folder``."""
    dataset = spec.dataset
    needed, optional = needed_columns(dataset)
    rows = Rows(train_source, needed, optional, frozenset(MEDIA))
    own_rows = replace(rows, source=eval_source) if eval_source else None
    held_out = _held_out(rows, spec)
    with ExitStack() as files:
        train = Split("training", files.enter_context(RowWriter(folder / "train")))
        evaluation = None
        if own_rows is not None or held_out is not None:
            evaluation = Split("evaluation", files.enter_context(RowWriter(folder / "eval")))

        def side_of(number: int) -> Split:
            return evaluation if evaluation and held_out is not None and held_out[number] else train

        tallies = [collect(encoder, rows, str(train_source.path), side_of)]
        require_rows(train, dataset, tallies[0], str(train_source.path))
        if evaluation:
            if own_rows is not None:
                tallies.append(collect(encoder, own_rows, str(own_rows.source.path), lambda _: evaluation))
            require_rows(evaluation, dataset, tallies[-1], str((own_rows or rows).source.path))
    return _Tokenized(train, evaluation, tallies)


def _held_out(rows: Rows, spec: QLoRAJobSpec) -> NDArray[np.bool_] | None:
    """[rows]; True: the row is held out for evaluation. None if no fraction is. Reads all rows to count them."""
    fraction = spec.dataset.eval.fraction if spec.dataset.eval else None
    if fraction is None:
        return None
    count = rows.count()
    share = round(Decimal(fraction) * count)
    if not 1 <= share < count:
        raise UserError(
            FRACTION_FIELD,
            fraction,
            f"holds out {share} of {count} rows; at least one row must be held out and one left to train on."
            " Raise the fraction, add rows, or leave eval out",
        )
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[permutation(count, (spec.training.seed, HOLD_OUT))[:share]] = True
    return chosen


def _receipt(name: str, folder: Path, encoder: Encoder, done: _Tokenized) -> PrepareReceipt:
    """Pack both sides, write that beside them, and sum up."""
    dataset = encoder.dataset
    train, packs = _pack(folder / "train", dataset)
    held_out = _pack(folder / "eval", dataset)[0] if done.evaluation else None
    tokens = int(train.offsets[-1])
    return PrepareReceipt(
        data_hash=name,
        train_rows=len(train),
        train_tokens=tokens,
        train_target_tokens=int(train.target_counts.sum(dtype=np.int64)),
        train_sequences=len(packs),
        eval_rows=len(held_out) if held_out else 0,
        eval_tokens=int(held_out.offsets[-1]) if held_out else 0,
        truncated=sum(t.truncated for t in done.tallies),
        dropped=sum(t.dropped for t in done.tallies),
        fully_masked=sum(t.fully_masked for t in done.tallies),
        rows=sum(t.rows for t in done.tallies),
        rows_with_tools=sum(t.with_tools for t in done.tallies),
        split_rows=sum(t.split for t in done.tallies),
        left_out=sum(t.left_out for t in done.tallies),
        empty_turns=sum(t.empty_turns for t in done.tallies),
        notes=_notes(encoder, done.tallies),
        conversations=bool(encoder.conversations),
        duplicates=done.train.duplicates,
        eval_in_train=done.evaluation.also_in(done.train) if done.evaluation else 0,
        eval_prompts_in_train=done.evaluation.prompts_also_in(done.train) if done.evaluation else 0,
        longest=max(t.longest for t in done.tallies),
        lengths=histogram(train.lengths),
        packing_efficiency=tokens / (len(packs) * dataset.max_length),
        samples=samples(train, encoder.tokenizer),
    )


def _notes(encoder: Encoder, tallies: list[Tally]) -> list[str]:
    unread = frozenset[str]().union(*(tally.unread for tally in tallies))
    return [
        *encoder.notes(),
        *(note for tally in tallies for note in tally.remarks.notes()),
        *([f"columns that are not read: {shown_columns(unread)}"] if unread else []),
    ]


def histogram(lengths: NDArray[np.int64]) -> dict[int, int]:
    """Count the rows of up to 2ⁿ tokens and more than half of it, by 2ⁿ."""
    bounds, counts = np.unique(1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64), return_counts=True)
    return dict(zip(bounds.tolist(), counts.tolist(), strict=True))


def _pack(folder: Path, dataset: DatasetSpec) -> tuple[TokenizedRows, Sequences]:
    rows = TokenizedRows.load(folder)
    sequences = pack(rows.lengths, dataset.max_length) if dataset.packing else unpacked(len(rows))
    save_sequences(sequences, folder)
    return rows, sequences
