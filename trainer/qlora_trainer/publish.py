"""Publishing: files under the attempt's own folder first, then the manifest, create-only.

::

    <destination>/3f2a9c01-attempt-2/adapter/adapter_model.safetensors …
    <destination>/3f2a9c01-attempt-2/merged/…                            if spec.output.merge asks for it
    <destination>/manifest.json                                          last; of two writers one wins

Who finds no manifest finds no adapter: a crash at any point leaves a folder nobody refers to.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic import ValidationError

from qlora_api.status import Adapter
from qlora_trainer.card import model_card
from qlora_trainer.errors import AdapterRejectedError, StorageError, UserError
from qlora_trainer.gate import verify_adapter, verify_merged
from qlora_trainer.manifest import (
    ADAPTER,
    MANIFEST,
    MERGED,
    BaseModelRef,
    Manifest,
    PublishedFile,
    PublishFacts,
    installed_packages,
    metrics_of,
)
from qlora_trainer.store import AlreadyExistsError, NotFoundError, Store, open_store, sha256_bytes, sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qlora_api.contract import JobRef

__all__ = [
    "AdapterRejectedError",
    "Manifest",
    "PublishFacts",
    "check_destination",
    "publish",
    "verify_adapter",
    "verify_published",
]

FIELD = "spec.output.destination"
CREATE_TRIES = 3
"""S3 answers two create-only writes at once with a conflict for one of them even if the other then fails."""
log = logging.getLogger(__name__)


def check_destination(uri: str, run_uid: str) -> None:
    """Find out before the training whether its result can be published.

    Raises:
        UserError: the destination cannot be written, or holds another run's adapter.
        StorageError: it is out of reach, or full.

    """
    store = open_store(uri, FIELD)
    _own_manifest(store, run_uid)
    probe = f".write-check-{run_uid[:8]}"
    store.put(probe, b"")
    try:
        store.delete(probe)
    except UserError as error:
        log.warning("%s stays behind, deleting is not allowed: %s", store.uri(probe), error)


def publish(
    store_uri: str,
    job: JobRef,
    attempt: int,
    folder: Path,
    facts: PublishFacts,
    *,
    base_names: Iterable[str] | None = None,
) -> Adapter:
    """Check, upload and declare an adapter. Called again, by the same run, it answers what is published.

    Args:
        store_uri: ``spec.output.destination``.
        job: names the run.
        attempt: names the folder within the destination.
        folder: has ``adapter`` in PEFT's layout with the tokenizer's files, and may have ``merged``. The model card is
            written into ``adapter``.
        facts: for the manifest and the card.
        base_names: for :func:`qlora_trainer.gate.verify_adapter`.

    Raises:
        AdapterRejectedError: the gate refuses it.
        UserError: the destination holds another run's adapter, or cannot be written.
        StorageError: it is out of reach, or full.

    """
    store = open_store(store_uri, FIELD)
    if earlier := _own_manifest(store, job.uid):
        return _verified(store, *earlier)
    verify_adapter(folder / ADAPTER, base_names)
    if (folder / MERGED).is_dir():
        verify_merged(folder / MERGED)
    (folder / ADAPTER / "README.md").write_text(model_card(job, attempt, facts))
    place = f"{job.uid[:8]}-attempt-{attempt}"
    manifest = _manifest(job, attempt, folder, place, facts)
    _upload(store, folder, place, manifest)
    data = manifest.to_bytes()
    declared = _declare(store, manifest, data)
    if declared is None:
        return _adapter(store, manifest, data)
    if declared[0].adapter != manifest.adapter:
        store.delete(place)  # another attempt of this run was faster
    return _verified(store, *declared)


def verify_published(manifest_uri: str) -> list[str]:
    """Read every published file back and hold it against the manifest.

    Args:
        manifest_uri: of the manifest itself, ``…/manifest.json``.

    Returns:
        What is wrong, one line each; nothing where all is well.

    Raises:
        UserError: there is no manifest, or it cannot be read.
        StorageError: the storage is out of reach.

    """
    parent, slash, name = manifest_uri.rpartition("/")
    store = open_store(parent or slash or ".", "manifest")
    try:
        data = store.get(name)
    except NotFoundError as error:
        raise UserError("manifest", manifest_uri, "does not exist") from error
    return _problems(store, _parsed(store, name, data))


# ------------------------------------------------------------------------------------------------------------ manifest


def _own_manifest(store: Store, run_uid: str) -> tuple[Manifest, bytes] | None:
    """Return this run's manifest with its bytes; None where nothing is published yet."""
    try:
        data = store.get(MANIFEST)
    except NotFoundError:
        return None
    manifest = _parsed(store, MANIFEST, data)
    if manifest.run_uid != run_uid:
        raise UserError(
            store.field,
            store.uri(),
            f"already holds the adapter of run {manifest.run_uid} ({manifest.namespace}/{manifest.job}); "
            "choose another destination",
        )
    return manifest, data


def _parsed(store: Store, name: str, data: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(
            store.field, store.uri(name), f"is not a manifest of this operator ({reason}); choose another destination"
        ) from error


def _manifest(job: JobRef, attempt: int, folder: Path, place: str, facts: PublishFacts) -> Manifest:
    paths = sorted(p for top in (ADAPTER, MERGED) for p in (folder / top).rglob("*") if p.is_file())
    files = tuple(
        PublishedFile(
            path=f"{place}/{path.relative_to(folder).as_posix()}", size=path.stat().st_size, sha256=sha256_file(path)
        )
        for path in paths
    )
    return Manifest(
        job=job.name,
        namespace=job.namespace,
        run_uid=job.uid,
        attempt=attempt,
        created=datetime.now(UTC),
        base=BaseModelRef(source=facts.spec.model.source, revision=facts.base_revision),
        adapter=f"{place}/{ADAPTER}",
        merged=f"{place}/{MERGED}" if (folder / MERGED).is_dir() else None,
        files=files,
        metrics=metrics_of(facts),
        packages=installed_packages(),
        config=facts.spec.to_json_dict(),
    )


def _upload(store: Store, folder: Path, place: str, manifest: Manifest) -> None:
    """Upload every file and see that it arrived: the adapter read back, the large merged model by its sizes."""
    for file in manifest.files:
        store.put(file.path, folder / file.path.removeprefix(f"{place}/"))
    listed = {file.path: file for file in manifest.files}
    there = dict(store.list(place))
    for key in there.keys() - listed.keys():
        store.delete(key)  # left by an upload that was cut short
    for key, file in listed.items():
        read_back = key.startswith(f"{manifest.adapter}/")
        if there.get(key) != file.size or (read_back and store.sha256(key) != file.sha256):
            raise StorageError(f"{store.uri(key)} is not what was written to it")


def _declare(store: Store, manifest: Manifest, data: bytes) -> tuple[Manifest, bytes] | None:
    """Write the manifest; return the one that is there instead, if it is this run's.

    "Exists" may be the echo of our own write whose answer was lost, so what is there is read and compared.
    """
    for _ in range(CREATE_TRIES):
        try:
            store.create(MANIFEST, data)
        except AlreadyExistsError:
            if there := _own_manifest(store, manifest.run_uid):
                return there
        else:
            return None
    raise StorageError(f"{store.uri(MANIFEST)} can be neither created nor read")


def _verified(store: Store, manifest: Manifest, data: bytes) -> Adapter:
    """Say where an adapter published earlier is, once everything it promises is there."""
    if problems := _problems(store, manifest):
        raise UserError(
            store.field,
            store.uri(),
            f"holds this run's manifest, but {problems[0]}; delete {store.uri(MANIFEST)} and start the job again",
        )
    return _adapter(store, manifest, data)


def _adapter(store: Store, manifest: Manifest, data: bytes) -> Adapter:
    return Adapter(
        uri=store.uri(manifest.adapter), manifest_uri=store.uri(MANIFEST), manifest_sha256=sha256_bytes(data)
    )


def _problems(store: Store, manifest: Manifest) -> list[str]:
    problems = []
    for file in manifest.files:
        try:
            if store.sha256(file.path) != file.sha256:
                problems.append(f"{file.path} is not what was published: its SHA-256 differs")
        except NotFoundError:
            problems.append(f"{file.path} is missing")
        except ValueError as error:
            problems.append(f"the manifest names a file outside its folder: {error}")
    listed = {file.path for file in manifest.files}
    place = manifest.adapter.removesuffix(f"/{ADAPTER}")
    problems += [f"{key} is not in the manifest" for key, _ in store.list(place) if key not in listed]
    return problems
