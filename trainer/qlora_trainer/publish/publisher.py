"""Publishing: files under the attempt's own folder first, then the manifest, create-only.

::

    <destination>/3f2a9c01-attempt-2/adapter/adapter_model.safetensors …
    <destination>/3f2a9c01-attempt-2/merged/…                            if spec.output.merge asks for it
    <destination>/manifest.json                                          last; of two writers one wins

Who finds no manifest finds no adapter: a crash at any point leaves a folder nobody refers to.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from qlora_api.status import Adapter
from qlora_storage.object_store import AlreadyExistsError, Store, open_store, sha256_file
from qlora_trainer.errors import AdapterRejectedError, StorageError
from qlora_trainer.publish.adapter_manifest import (
    ADAPTER,
    MANIFEST,
    MERGED,
    SIGNATURE_PURPOSE,
    BaseModelRef,
    Manifest,
    ManifestFile,
    PublishFacts,
    installed_packages,
    metrics_of,
)
from qlora_trainer.publish.gate import verify_adapter, verify_gain, verify_loads, verify_merged
from qlora_trainer.publish.model_card import model_card
from qlora_trainer.publish.published_adapter import (
    FIELD,
    check_destination,
    check_gate,
    own_manifest,
    published_adapter,
    verified,
    verify_published,
)
from qlora_trainer.storage.authentication import UNAUTHENTICATED, Authenticator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
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

CREATE_TRIES = 3
"""S3 answers two create-only writes at once with a conflict for one of them even if the other then fails."""


def publish(
    store_uri: str,
    job: JobRef,
    attempt: int,
    folder: Path,
    facts: PublishFacts,
    *,
    base_names: Iterable[str] | None = None,
    skeleton: Any = None,
    beat: Callable[[], None] = lambda: None,
    authenticator: Authenticator = UNAUTHENTICATED,
) -> Adapter:
    """Check, upload and declare an adapter. Called again, by the same run, it answers what is published.

    Args:
        store_uri: ``spec.output.destination``.
        job: names the run.
        attempt: names the folder within the destination.
        folder: has ``adapter`` in PEFT's layout with the tokenizer's files, and may have ``merged``. The model card is
            written into ``adapter``.
        facts: for the manifest and the card.
        base_names: for :func:`qlora_trainer.publish.gate.verify_adapter`.
        skeleton: for :func:`qlora_trainer.publish.gate.verify_loads`; without it, that is not tried.
        beat: called after each file, as a sign of life.
        authenticator: signs the manifest, and tells one of this run's from what others put there.

    Raises:
        AdapterRejectedError: the gate refuses it.
        UserError: the destination holds another run's adapter, or cannot be written.
        StorageError: it is out of reach, or full.

    """
    store = open_store(store_uri, FIELD)
    if earlier := own_manifest(store, job.uid, authenticator):
        adapter = verified(store, *earlier)
        check_gate(store, earlier[0], facts.spec)
        return adapter
    verify_gain(facts.base_eval_loss, facts.eval_loss, may_be_worse=facts.spec.output.allow_worse_eval)
    verify_adapter(folder / ADAPTER, base_names, facts.spec.lora)
    if skeleton is not None:
        verify_loads(folder / ADAPTER, skeleton)
    if (folder / MERGED).is_dir():
        verify_merged(folder / MERGED)
    (folder / ADAPTER / "README.md").write_text(model_card(job, attempt, facts))
    place = f"{job.uid[:8]}-attempt-{attempt}"
    manifest = authenticator.signed(SIGNATURE_PURPOSE, _manifest(job, attempt, folder, place, facts))
    _upload(store, folder, place, manifest, beat)
    data = manifest.to_bytes()
    declared = _declare(store, manifest, data, authenticator)
    if declared is None:
        return published_adapter(store, manifest, data)
    if declared[0].adapter != manifest.adapter:
        store.delete(place)  # another attempt of this run was faster
    adapter = verified(store, *declared)
    check_gate(store, declared[0], facts.spec)
    return adapter


# ------------------------------------------------------------------------------------------------------------ manifest


def _manifest(job: JobRef, attempt: int, folder: Path, place: str, facts: PublishFacts) -> Manifest:
    paths = sorted(p for top in (ADAPTER, MERGED) for p in (folder / top).rglob("*") if p.is_file())
    files = tuple(
        ManifestFile(
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


def _upload(store: Store, folder: Path, place: str, manifest: Manifest, beat: Callable[[], None]) -> None:
    """Upload every file and see that it arrived: the adapter read back, the large merged model by its sizes."""
    for file in manifest.files:
        store.put(file.path, folder / file.path.removeprefix(f"{place}/"))
        beat()
    listed = {file.path: file for file in manifest.files}
    there = dict(store.list(place))
    for key in there.keys() - listed.keys():
        store.delete(key)  # left by an upload that was cut short
    for key, file in listed.items():
        read_back = key.startswith(f"{manifest.adapter}/")
        if there.get(key) != file.size or (read_back and store.sha256(key) != file.sha256):
            raise StorageError(f"{store.uri(key)} is not what was written to it")


def _declare(
    store: Store, manifest: Manifest, data: bytes, authenticator: Authenticator = UNAUTHENTICATED
) -> tuple[Manifest, bytes] | None:
    """Write the manifest; return the one that is there instead, if it is this run's.

    "Exists" may be the echo of our own write whose answer was lost, so what is there is read and compared.
    """
    for _ in range(CREATE_TRIES):
        try:
            store.create(MANIFEST, data)
        except AlreadyExistsError:
            if there := own_manifest(store, manifest.run_uid, authenticator):
                return there
        else:
            return None
    raise StorageError(f"{store.uri(MANIFEST)} can be neither created nor read")
