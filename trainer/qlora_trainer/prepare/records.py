"""Keep what Prepare found so that nobody finds it again: for this machine, or for all in the shared cache.

::

    <cache>/prepared/<key>.json      Record, by what it follows from: another job with the same content finds it
    <cache>/jobs/<run uid>.json      the Record a run began with: its trainers take that revision and those rows
    <cache>/data/<hash>/…            tokenized rows; in the shared cache files.json comes last and vouches for them

The run signs the record it begins with. In a cache of its own, below its destination, it takes no record by content
that it has not signed; a cache for all is for those who trust each other.

``<cache>`` is ``config.shared_cache_uri``, or ``config.cache_dir`` where there is none. Light to import: what was found
before is told in less than two seconds.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from uuid import uuid4

from pydantic import Field, TypeAdapter, ValidationError

from qlora_api.base import Model
from qlora_api.contract import PrepareReceipt
from qlora_memory import ModelShape
from qlora_storage.object_store import (
    AlreadyExistsError,
    NotFoundError,
    local_path,
    open_store,
    sha256_bytes,
    sha256_file,
)
from qlora_trainer.data.rows.source import contents, find_source
from qlora_trainer.errors import StorageError, UserError
from qlora_trainer.prepare.format_version import FORMAT_VERSION
from qlora_trainer.storage.authentication import Authenticator
from qlora_trainer.storage.fetch import HUB, model_revision, rows_identity, take_name
from qlora_trainer.storage.fetch_definitions import definitions_identity
from qlora_trainer.storage.model_files import ModelFilesError

if TYPE_CHECKING:
    from qlora_api.contract import TrainerConfig
    from qlora_api.spec import QLoRAJobSpec

PREPARE_VERSION = 4
"""Counts up when Prepare comes to refuse what it took before."""
FIELD = "spec.output.destination"
"""Whose credentials open the shared cache."""
FILES = "files.json"
SIGNATURE_PURPOSE = "record"
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
log = logging.getLogger(__name__)


class Record(Model):
    """All that Prepare found. Everything else follows from the job's config."""

    key: Hex
    model_source: str
    """As in the manifest."""
    model_revision: str
    receipt: PrepareReceipt
    shape: ModelShape | None
    """Shape of the base, from which the memory of a job on another GPU, or on more of them, is planned."""
    files_sha256: Hex | None = None
    """Hash of the list of the rows' files in a shared cache, so that other rows under the same name are not
    accepted."""
    tasks_hash: Hex | None = None
    """Name of the prepared tasks of spec.evaluate, beside the rows."""
    tasks_files_sha256: Hex | None = None
    """As files_sha256, of the tasks."""
    signature: Hex | None = None
    """HMAC-SHA256 over all other fields with the key of the run that began with it, or made it."""


class DataFile(Model):
    path: Annotated[str, Field(pattern=r"^([a-z0-9_]+/)*[a-z0-9_]+\.(npy|json|parquet)$")]
    size: int
    sha256: Hex


_FILES = TypeAdapter(list[DataFile])
T = TypeVar("T", bound=Model)


class Records:
    """The records of one cache, and the tokenized rows that belong to them."""

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        self._local = Path(config.cache_dir) / "data"
        self._authenticator = Authenticator.of(config)
        shared = config.shared_cache_uri
        destination = config.spec.output.destination.rstrip("/")
        self._is_own = shared is not None and shared.startswith(f"{destination}/")
        """True if the shared cache is inside the job's destination: no other job should use it, so a record must be
        signed with this run's key."""
        self._store = open_store(shared, FIELD) if shared else open_store(config.cache_dir, "the cache")

    @property
    def is_shared(self) -> bool:
        return self._config.shared_cache_uri is not None

    def of_run(self) -> Record | None:
        """The record this run began with."""
        return self._read(self._run_key, own=True)

    def by_key(self, key: str) -> Record | None:
        """The record of a job with the same content, if its rows are still there."""
        record = self._read(f"prepared/{key}.json", own=self._is_own)
        return record if record and self.has_rows(record) else None

    def _read(self, key: str, *, own: bool) -> Record | None:
        """Return a record; with ``own`` only one that this run has signed."""
        try:
            data = self._store.get(key)
            record = Record.model_validate_json(data)
        except NotFoundError:
            return None
        except ValidationError as error:  # another version's
            log.debug("%s: %s", self._store.uri(key), error)
            return None
        if own and (problem := self._authenticator.problem_of_file(SIGNATURE_PURPOSE, data)):
            log.warning("%s is not used, since it was not written by this run: %s", self._store.uri(key), problem)
            return None
        return record

    def _signed(self, record: Record) -> Record:
        return self._authenticator.signed(SIGNATURE_PURPOSE, record)

    def has_rows(self, record: Record) -> bool:
        return all(self._has(name) for name in (record.receipt.data_hash, record.tasks_hash) if name)

    def _has(self, name: str) -> bool:
        if self.is_shared:
            return self._store.stat(f"data/{name}/{FILES}") is not None
        return (self._local / name).exists()

    def keep(self, record: Record) -> Record:
        """Leave a record, and, in a shared cache, the rows it speaks of.

        Returns:
            The run's record: another pod of the same run may have been first, and then its record counts.

        """
        if self.is_shared:
            record = record.model_copy(
                update={
                    "files_sha256": self._upload(record.receipt.data_hash),
                    "tasks_files_sha256": self._upload(record.tasks_hash) if record.tasks_hash else None,
                }
            )
        data = self._signed(record).model_dump_json(by_alias=True).encode()
        self._store.put(f"prepared/{record.key}.json", data)
        return self.begin(record)

    def begin(self, record: Record) -> Record:
        """Make it the record that the run begins with, unless the run has begun with the same rows and model."""
        if self.is_shared and record.files_sha256 is None:  # of a version that did not name them
            listed = self._store.get(f"data/{record.receipt.data_hash}/{FILES}")
            record = record.model_copy(update={"files_sha256": sha256_bytes(listed)})
        record = self._signed(record)
        data = record.model_dump_json(by_alias=True).encode()
        began = self.of_run()
        if began == record:
            return record
        if began is None:
            try:
                self._store.create(self._run_key, data)
            except AlreadyExistsError:
                if other := self.of_run():
                    return other
            else:
                return record
        self._store.put(self._run_key, data)
        return record

    def bring_rows(self, record: Record) -> Path | None:
        """The folder of the record's rows on this machine; None where they are damaged, and now deleted.

        Raises:
            StorageError: the shared cache is out of reach, or this machine's is full.

        """
        return self._bring(record.receipt.data_hash, record.files_sha256)

    def bring_tasks(self, record: Record) -> Path | None:
        """The folder of the record's tasks, as :meth:`bring_rows` says of its rows; None also where it has none."""
        return self._bring(record.tasks_hash, record.tasks_files_sha256) if record.tasks_hash else None

    def _bring(self, name: str, files_sha256: str | None) -> Path | None:
        folder = self._local / name
        if folder.exists() or not self.is_shared:
            return folder if folder.exists() else None
        partial = folder.with_name(f".{name}-{uuid4().hex[:8]}")
        try:
            if not self._download(name, files_sha256, partial):
                return None
            take_name(partial, folder)
        except OSError as error:
            raise StorageError(f"cannot put what Prepare made into {folder}: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder

    @property
    def _run_key(self) -> str:
        return f"jobs/{self._config.job.uid}.json"

    def _upload(self, name: str) -> str:
        """Leave the rows, unless these very rows are there; return the SHA-256 of the list of their files."""
        folder = self._local / name
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        files = [
            DataFile(path=p.relative_to(folder).as_posix(), size=p.stat().st_size, sha256=sha256_file(p)) for p in paths
        ]
        listed = _FILES.dump_json(files)
        try:
            there = self._store.get(f"data/{name}/{FILES}")
        except NotFoundError:
            there = b""
        if there != listed:
            for file in files:
                self._store.put(f"data/{name}/{file.path}", folder / file.path)
            self._store.put(f"data/{name}/{FILES}", listed)
        return sha256_bytes(listed)

    def _download(self, name: str, files_sha256: str | None, folder: Path) -> bool:
        """Copy rows or tasks; False, and the shared copy deleted, where they are not what was written."""
        try:
            listed = self._store.get(f"data/{name}/{FILES}")
            files = _FILES.validate_json(listed)
            changed = [FILES] if files_sha256 not in (None, sha256_bytes(listed)) else []
            for file in () if changed else files:
                self._store.download_file(f"data/{name}/{file.path}", folder / file.path)
                if sha256_file(folder / file.path) != file.sha256:
                    changed.append(file.path)
        except (NotFoundError, ValidationError) as error:
            changed = [str(error)]
        if changed:
            place = self._store.uri(f"data/{name}")
            log.warning("what Prepare left at %s is not what was written (%s): deleted", place, changed[0])
            self._store.delete(f"data/{name}/{FILES}")
        return not changed


def find(config: TrainerConfig, records: Records) -> Record | None:
    """Return what was found for this very content before; None where Prepare has to look.

    A run stays at the model revision that it began with, whatever its branch on the Hub says by now.
    """
    spec = config.spec
    try:
        pinned = pinned_revision(spec, records.of_run())
        key = job_key(spec, pinned or model_revision(spec.model.source, Path(config.cache_dir)))
    except (ModelFilesError, UserError, StorageError, OSError) as error:
        log.debug("nothing is known of this job: %s", error)  # Prepare says what is wrong, if it still is
        return None
    return records.by_key(key)


def pinned_revision(spec: QLoRAJobSpec, began: Record | None) -> str | None:
    """The commit that a run from the Hub began with."""
    source = spec.model.source
    return began.model_revision if began and began.model_source == source and source.startswith(HUB) else None


def job_key(spec: QLoRAJobSpec, revision: str) -> str:
    """Hash of all that Prepare's findings follow from, without tokenizing; hex.

    Raises:
        UserError, StorageError, OSError: the rows cannot be looked at.

    """
    plain = spec.to_json_dict()
    dataset = {k: v for k, v in plain["dataset"].items() if k not in ("train", "eval", "tolerance")}
    held_out = spec.dataset.eval
    own_eval = held_out.source if held_out else None
    facts = {
        "versions": [PREPARE_VERSION, FORMAT_VERSION],
        "model": revision,
        "dataset": dataset,
        "heldOut": [held_out.fraction, spec.training.seed] if held_out and held_out.fraction else None,
        "train": _identity(spec.dataset.train.source, "spec.dataset.train.source"),
        "eval": _identity(own_eval, "spec.dataset.eval.source") if own_eval else None,
        "quantization": {k: v for k, v in plain["quantization"].items() if v != []},
        "lora": {k: v for k, v in plain["lora"].items() if v != []},
        **({"evaluate": _tasks_identity(spec)} if spec.evaluate else {}),
        **({"prompts": prompts} if (prompts := spec.training.evaluation.prompts) else {}),
    }
    return sha256_bytes(json.dumps(facts, sort_keys=True).encode())


def _tasks_identity(spec: QLoRAJobSpec) -> dict[str, Any]:
    """Name what the tasks follow from; datasets of the Hub, which change seldom, stay those of the first Prepare."""
    assert spec.evaluate is not None
    folder = spec.evaluate.folder
    return {"spec": spec.evaluate.to_json_dict(), "folder": definitions_identity(folder) if folder else None}


def _identity(source: str, field: str) -> str:
    """Name the rows of a source: local files by their content, all that are read and no others."""
    local = local_path(source, field)
    if local is None:
        return rows_identity(source, field)
    found = find_source(local, field)
    return "\n".join([*(file.name for file in found.files), *contents(found)])
