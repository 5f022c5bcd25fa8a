"""Make what the tasks ask, and what their scores are computed from, before any GPU is held.

Kept beside the tokenized rows, under a name made of its content::

    <cache>/data/<hash>/order.json, documents/…    for lm-evaluation-harness, once there are answers
    <cache>/data/<hash>/requests.json              [[context, continuation], …]
    <cache>/data/<hash>/rows/…                     each request as a row: context, then the continuation as targets
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_storage.object_store import sha256_bytes, sha256_file
from qlora_trainer.data.packing import pack, unpacked
from qlora_trainer.data.tokenized_rows import RowWriter, TokenizedRows, save_sequences
from qlora_trainer.errors import StorageError, UserError
from qlora_trainer.storage.fetch import take_name
from qlora_trainer.tasks.definitions import DefinitionError, read_definition
from qlora_trainer.tasks.harness_request import DOCUMENTS, ORDER_FILE, Order, OrderedTask
from qlora_trainer.tasks.run_harness import FIELD, check_installed, run_harness

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_api.spec import EvaluateSpec, EvaluationTask
    from qlora_trainer.data.formats import Encoder
    from qlora_trainer.tasks.harness_request import HarnessResult

FOLDER_FIELD = "spec.evaluate.folder"
REQUESTS_FILE = "requests.json"
ROWS = "rows"
BATCH = 4096
"""Requests that are tokenized together."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedTasks:
    """The prepared tasks."""

    name: str
    """Name of the folder of the tasks: a hash of its content."""
    notes: list[str]
    """Notes on the tasks for the author of the job."""


def prepare_tasks(spec: EvaluateSpec, folder: Path | None, encoder: Encoder, cache_dir: Path) -> PreparedTasks:
    """Ask lm-evaluation-harness what the tasks ask, tokenize it, and leave both in the cache.

    Args:
        spec: the tasks.
        folder: ``spec.folder``, on this machine.
        encoder: of the job's rows: requests begin as they do.
        cache_dir: of the machine.

    Raises:
        UserError: names a task that does not exist, cannot be asked or does not fit ``maxLength``.
        StorageError: the cache cannot be written.

    """
    check_installed()
    order = Order(tasks=[_ordered(task, folder) for task in spec.tasks], limit=spec.limit)
    try:
        (cache_dir / "data").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tasks-", dir=cache_dir / "data") as temporary:
            work, kept = Path(temporary) / "work", Path(temporary) / "kept"
            work.mkdir()
            kept.mkdir()
            outcome = run_harness(work, order)
            shutil.move(work / DOCUMENTS, kept / DOCUMENTS)
            (kept / ORDER_FILE).write_text(_elsewhere(order).model_dump_json())
            (kept / REQUESTS_FILE).write_text(json.dumps(outcome.requests))
            cut = _tokenize(outcome.requests, encoder, kept / ROWS)
            name = _hash_of(kept)
            take_name(kept, cache_dir / "data" / name)
    except OSError as error:
        raise StorageError(f"cannot put the tasks of spec.evaluate into {cache_dir}: {error}") from error
    return PreparedTasks(name, _notes(outcome, cut, encoder.dataset.max_length))


def _ordered(task: EvaluationTask, folder: Path | None) -> OrderedTask:
    try:
        definition = read_definition(folder, task.name) if folder else None
    except DefinitionError as error:
        raise UserError(FOLDER_FIELD, str(folder), str(error)) from None
    return OrderedTask(name=task.name, few_shot=task.few_shot, metric=task.metric, definition=definition)


def _elsewhere(order: Order) -> Order:
    """Return the order without the places of rows on this machine."""
    tasks = [
        task.model_copy(update={"definition": task.definition and {**task.definition, "dataset_kwargs": {}}})
        for task in order.tasks
    ]
    return order.model_copy(update={"tasks": tasks})


def _tokenize(requests: Sequence[tuple[str, str]], encoder: Encoder, folder: Path) -> int:
    """Write each request as a row; return how many lost the beginning of their context."""
    most, cut = encoder.dataset.max_length, 0
    with RowWriter(folder) as rows:
        for start in range(0, len(requests), BATCH):
            for number, (tokens, first) in enumerate(encode_requests(requests[start : start + BATCH], encoder), start):
                if not 0 < len(tokens) - first < most:
                    context, text = requests[number]
                    raise UserError(
                        FIELD,
                        text[:100],
                        f"is an answer of {len(tokens) - first} tokens, after {context[-60:]!r}; there must be some, "
                        f"and fewer than dataset.maxLength, {most}",
                    )
                lost = max(0, len(tokens) - most)
                cut += bool(lost)
                rows.append(tokens[lost:], [at >= first for at in range(lost, len(tokens))])
    written = TokenizedRows.load(folder)
    sequences = pack(written.lengths, most) if encoder.dataset.packing else unpacked(len(written))
    save_sequences(sequences, folder)
    return cut


def encode_requests(requests: Sequence[tuple[str, str]], encoder: Encoder) -> list[tuple[list[int], int]]:
    """Return the tokens of each request, and where its continuation begins.

    White space between the two belongs to the continuation, and both are tokenized as one text, as in
    lm-evaluation-harness (``TemplateLM._encode_pair``). A request without a context follows the tokens that stand
    before every text, or the end token.
    """
    contexts = [context.rstrip() for context, _ in requests]
    wholes = encoder.beginnings([context + text for context, text in requests])
    alone = encoder.beginnings(contexts)
    encoded = []
    for context, whole, before in zip(contexts, wholes, alone, strict=True):
        first = len(before) if context else len(encoder.beginnings([""])[0])
        encoded.append((whole, first) if first else ([encoder.tokenizer.eos_token_id, *whole], 1))
    return encoded


def _hash_of(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder).as_posix()} {sha256_file(path)}" for path in files]
    return sha256_bytes("\n".join(lines).encode())


def _notes(outcome: HarnessResult, cut: int, most: int) -> list[str]:
    asked = ", ".join(f"{task.name} ({task.examples:,} examples, {task.metric})" for task in outcome.tasks)
    notes = [f"spec.evaluate asks {len(outcome.requests):,} questions: {asked}"]
    if cut:
        notes.append(f"{cut:,} of them lose the beginning of their context: dataset.maxLength is {most}")
    return notes
