"""Checkpoints in a store: written by all ranks, vouched for by one marker, read back only when they verify.

::

    <uri>/step-00000120/attempt-2/adapter.safetensors   every rank writes its own files
    <uri>/step-00000120/COMPLETE.json                   rank 0, last: sizes and SHA-256 of all of them

A folder without its marker was cut short and is no checkpoint; one whose marker the run has not signed is not used.
Attempts write beside each other and never over what a marker vouches for; one that was taken for lost and goes on all
the same commits nothing once a newer one has.

Knows files and bytes, not engines; tensors travel as safetensors, since unpickling a file from a bucket would run
whatever code somebody put there.
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from qlora_api.base import Model
from qlora_storage.object_store import NotFoundError, open_store, sha256_bytes
from qlora_trainer.errors import CheckpointError, PreemptedError, StorageError, UserError
from qlora_trainer.storage.authentication import UNAUTHENTICATED, Authenticator, canonical

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from qlora_storage.object_store import Store

MARKER = "COMPLETE.json"
SIGNATURE_PURPOSE = "checkpoint"
_FOLDER = re.compile(r"^step-(\d{8,})$")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    size: int
    """Bytes."""
    sha256: str


class Marker(Model):
    """Contents of ``COMPLETE.json``; the file holds this, its SHA-256 and the run's signature."""

    step: int
    run_uid: str
    attempt: int | None = None
    """Whose files these are; None: of a version that wrote them beside the marker."""
    eval_loss: float | None
    files: tuple[FileEntry, ...]
    meta: dict[str, Any]
    """The trainer's own: where the run stands, as JSON."""

    def to_bytes(self, authenticator: Authenticator) -> bytes:
        body = self.model_dump(by_alias=True)
        signature = authenticator.sign(SIGNATURE_PURPOSE, body)
        signed = {} if signature is None else {"signature": signature}
        return json.dumps({"sha256": sha256_bytes(canonical(body)), **signed, "checkpoint": body}, indent=1).encode()


class Checkpoint:
    """A whole checkpoint. ``read`` verifies each file again: it may have changed since."""

    def __init__(self, store: Store, folder: str, marker: Marker) -> None:
        self._store = store
        self._folder = folder if marker.attempt is None else f"{folder}/{files_of(marker.attempt)}"
        self._files = {f.name: f for f in marker.files}
        self.step = marker.step
        self.meta = marker.meta
        self.eval_loss = marker.eval_loss
        self.entries = marker.files

    def read(self, name: str) -> bytes:
        """Content of one of the checkpoint's files.

        Raises:
            CheckpointError: the file is not part of the checkpoint, is gone, or is not what was written.

        """
        if name not in self._files:
            raise CheckpointError(f"{self._store.uri(self._folder)} holds no {name}; it holds {', '.join(self._files)}")
        key = f"{self._folder}/{name}"
        try:
            data = self._store.get(key)
        except NotFoundError as error:
            raise CheckpointError(f"{self._store.uri(key)} is missing") from error
        _check_digest(self._store.uri(key), self._files[name], len(data), sha256_bytes(data))
        return data

    def verify(self) -> None:
        """Read every file against size and SHA-256, without holding one in memory.

        Raises:
            CheckpointError: names the first file that is missing or differs.

        """
        sizes = dict(self._store.list(self._folder))
        for file in self.entries:
            key = f"{self._folder}/{file.name}"
            if key not in sizes:
                raise CheckpointError(f"{self._store.uri(key)} is missing")
            digest = self._store.sha256(key) if sizes[key] == file.size else ""
            _check_digest(self._store.uri(key), file, sizes[key], digest)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        uri: the run's folder, local or in object storage; see :func:`qlora_storage.object_store.open_store`.
        run_uid: of the run; checkpoints of another are never read, counted or deleted.
        keep: newest checkpoints that stay; the best by eval loss stays besides.
        attempt: whose checkpoints are written.
        authenticator: signs checkpoints, and tells this run's from what others put there.
        field: of the manifest, for messages about the folder and its credentials.

    """

    def __init__(
        self,
        uri: str,
        run_uid: str,
        keep: int,
        attempt: int = 1,
        *,
        authenticator: Authenticator = UNAUTHENTICATED,
        field: str = "spec.output.destination",
    ) -> None:
        self._authenticator = authenticator
        self._store = open_store(uri, field)
        self._attempt = attempt
        self._run_uid = run_uid
        self._keep = keep

    def write_file(self, step: int, name: str, data: bytes) -> FileEntry:
        """Write one file durably; any rank, before the barrier that precedes ``commit``.

        Raises:
            StorageError: disk full or storage out of reach. Complete checkpoints are untouched.

        """
        if name == MARKER:
            raise ValueError(f"{MARKER} is written by commit")
        self._store.put(f"{folder_of(step)}/{files_of(self._attempt)}/{name}", data)
        return FileEntry(name, len(data), sha256_bytes(data))

    def commit(self, step: int, entries: Iterable[FileEntry], meta: dict[str, Any], eval_loss: float | None) -> None:
        """Declare a checkpoint whole, then delete what is no longer needed. Rank 0, after all files are written.

        Args:
            step: the files' step.
            entries: what every rank's ``write_file`` returned.
            meta: anything JSON can hold; floats come back bit for bit.
            eval_loss: evaluation loss at this step, None where there was no evaluation.

        Raises:
            StorageError: the marker could not be written. Trouble in deleting is only logged.
            PreemptedError: a newer attempt has committed already: this one was taken for lost.

        """
        losses, foreign = self._survey()
        marker = Marker(
            step=step,
            run_uid=self._run_uid,
            attempt=self._attempt,
            eval_loss=eval_loss,
            files=tuple(entries),
            meta=meta,
        )
        self._store.put(f"{folder_of(step)}/{MARKER}", marker.to_bytes(self._authenticator))
        try:
            self._prune(step, losses | {step: eval_loss}, foreign)
        except (StorageError, UserError) as error:
            log.warning("the checkpoint at step %d is whole, but older ones could not be deleted: %s", step, error)

    def amend(self, step: int, meta: dict[str, Any], eval_loss: float | None) -> None:
        """Say more of a checkpoint that is whole: of one that was saved before its evaluation. Rank 0.

        Raises:
            CheckpointError: its marker is missing or broken.
            StorageError: storage is out of reach.

        """
        marker = self._marker(step)
        amended = marker.model_copy(update={"meta": {**marker.meta, **meta}, "eval_loss": eval_loss})
        self._store.put(f"{folder_of(step)}/{MARKER}", amended.to_bytes(self._authenticator))

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint whose marker and files verify; None where the run has none yet.

        Raises:
            CheckpointError: there are checkpoints and every one is broken.
            UserError: there are only another run's.

        """
        return self._first_whole(sorted(self._complete(), reverse=True))

    def best(self) -> Checkpoint | None:
        """Return the checkpoint with the lowest eval loss that verifies; None where nothing was evaluated.

        Raises:
            CheckpointError: there are such checkpoints and every one is broken.

        """
        return self._first_whole(by_loss(self._survey()[0]))

    def chosen(self) -> Checkpoint | None:
        """Return the one to publish: the best, or the newest where nothing was evaluated; None where there is none.

        Raises:
            CheckpointError: there are such checkpoints and every one is broken.

        """
        return self.best() or self.newest()

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step that ``newest`` found on another rank; files are verified when read.

        Raises:
            CheckpointError: its marker is missing or broken.
            UserError: it is another run's.

        """
        return self._open(step)

    def _first_whole(self, steps: list[int]) -> Checkpoint | None:
        broken: list[CheckpointError] = []
        foreign: list[UserError] = []
        for step in steps:
            try:
                checkpoint = self._open(step)
                checkpoint.verify()
            except CheckpointError as error:
                log.warning("the checkpoint at step %d is broken and passed over: %s", step, error)
                broken.append(error)
            except _ForeignCheckpointError as error:
                log.warning("the checkpoint at step %d is passed over: %s", step, error)
                foreign.append(error)
            else:
                return checkpoint
        if broken:
            raise CheckpointError(f"no checkpoint in {self._store.uri()} can be read: {broken[0]}")
        if foreign:
            raise foreign[0]
        return None

    def _open(self, step: int) -> Checkpoint:
        marker = self._marker(step)
        if marker.run_uid != self._run_uid:
            raise _ForeignCheckpointError(
                self._store.field,
                self._store.uri(),
                f"holds checkpoints of run {marker.run_uid}, this is run {self._run_uid}; choose another folder",
            )
        return Checkpoint(self._store, folder_of(step), marker)

    def _marker(self, step: int) -> Marker:
        key = f"{folder_of(step)}/{MARKER}"
        uri = self._store.uri(key)
        try:
            file = json.loads(self._store.get(key))
            digest, body = file["sha256"], file["checkpoint"]
            marker = Marker.model_validate(body)
        except NotFoundError as error:
            raise CheckpointError(f"{uri} is missing") from error
        except (ValueError, TypeError, LookupError, ValidationError) as error:
            raise CheckpointError(f"{uri} cannot be read: {error}") from error
        if digest != sha256_bytes(canonical(body)) or marker.step != step:
            raise CheckpointError(f"{uri} is not what was written: its SHA-256 or step differs")
        problem = self._authenticator.problem(SIGNATURE_PURPOSE, body, file.get("signature"))
        if problem and marker.run_uid == self._run_uid:  # of another run nothing is used
            raise CheckpointError(f"{uri} was not written by this run: {problem}")
        return marker

    def _folders(self) -> dict[int, bool]:
        """Every step that has a folder, and whether a marker is in it."""
        found: dict[int, bool] = {}
        for key, _ in self._store.list():
            folder, _, name = key.partition("/")
            if match := _FOLDER.match(folder):
                step = int(match[1])
                found[step] = found.get(step, False) or name == MARKER
        return found

    def _complete(self) -> list[int]:
        return [step for step, complete in self._folders().items() if complete]

    def _survey(self) -> tuple[dict[int, float | None], set[int]]:
        """Eval loss of each of this run's checkpoints, and the steps of other runs'. Broken markers are in neither.

        Raises:
            PreemptedError: one of them is of a newer attempt.

        """
        losses: dict[int, float | None] = {}
        foreign: set[int] = set()
        for step in self._complete():
            try:
                marker = self._marker(step)
            except CheckpointError as error:
                log.debug("not counted: %s", error)
                continue
            if marker.run_uid != self._run_uid:
                foreign.add(step)
                continue
            if marker.attempt is not None and marker.attempt > self._attempt:
                raise PreemptedError(
                    f"attempt {marker.attempt} has gone on from here and saved step {step}: attempt {self._attempt} "
                    "was taken for lost, and ends"
                )
            losses[step] = marker.eval_loss
        return losses, foreign

    def _prune(self, committed: int, losses: Mapping[int, float | None], foreign: set[int]) -> None:
        for step in to_delete(committed, set(self._folders()) - foreign, losses, self._keep):
            # The marker first: a deletion cut short must not leave a checkpoint that looks whole.
            self._store.delete(f"{folder_of(step)}/{MARKER}")
            self._store.delete(folder_of(step))


class _ForeignCheckpointError(UserError):
    """A checkpoint of another run."""


def files_of(attempt: int) -> str:
    """Folder of one attempt's files within a step's."""
    return f"attempt-{attempt}"


def folder_of(step: int) -> str:
    """Folder of a step's checkpoint; sorts as the steps do."""
    return f"step-{step:08d}"


def to_delete(committed: int, folders: Iterable[int], losses: Mapping[int, float | None], keep: int) -> list[int]:
    """Decide which steps' folders go once the checkpoint at ``committed`` is whole.

    The ``keep`` newest stay, and the best by eval loss (the newer of equals). What is newer than ``committed`` was
    passed over as broken when the run resumed further back, and must not count as one of the newest.

    Args:
        committed: the step just declared whole.
        folders: every step that has a folder, whole or cut short.
        losses: eval loss of each whole one, None where there was no evaluation.
        keep: at least 1.

    """
    whole = sorted(step for step in losses if step <= committed)
    best = by_loss({step: losses[step] for step in whole})[:1]
    return sorted(set(folders) - set(whole[-keep:]) - set(best))


def by_loss(losses: Mapping[int, float | None]) -> list[int]:
    """Sort the steps with a finite eval loss, best first; of equals the newer first."""
    finite = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return sorted(finite, key=lambda step: (finite[step], -step))


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialize tensors of any shapes and devices as one safetensors file."""
    # Safetensors refuses views of one storage, such as shards of a flat buffer: each gets memory of its own.
    return save({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()})


def unpack_tensors(data: bytes) -> dict[str, Tensor]:
    """Tensors on the CPU, bit for bit as :func:`pack_tensors` got them.

    Raises:
        CheckpointError: the bytes are no safetensors file.

    """
    try:
        return load(data)
    except SafetensorError as error:
        raise CheckpointError(f"cannot be read as safetensors: {error}") from error


def _check_digest(uri: str, file: FileEntry, size: int, sha256: str) -> None:
    if size != file.size:
        raise CheckpointError(f"{uri} has {size} bytes, {file.size} were written")
    if sha256 != file.sha256:
        raise CheckpointError(f"{uri} is not what was written: its SHA-256 differs")
