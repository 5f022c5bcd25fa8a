"""Find what is published already, and whether it is still what was published. Light to import: no torch, no PEFT.

The manifest, ``<destination>/manifest.json``, names the run it belongs to and every file with its SHA-256.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from qlora_api.contract import ExitCode, TerminationMessage
from qlora_api.status import Adapter, Progress, Reason
from qlora_storage import published
from qlora_storage.object_store import (
    AlreadyExistsError,
    NotFoundError,
    Store,
    is_place_in,
    open_store,
    sha256_bytes,
    sha256_file,
)
from qlora_trainer.errors import StorageError, UserError
from qlora_trainer.publish.adapter_manifest import ADAPTER, MANIFEST, SIGNATURE_PURPOSE, Manifest
from qlora_trainer.storage.authentication import UNAUTHENTICATED, Authenticator

if TYPE_CHECKING:
    from qlora_api.contract import TrainerConfig
    from qlora_api.spec import QLoRAJobSpec

FIELD = "spec.output.destination"
log = logging.getLogger(__name__)


def check_destination(uri: str, run_uid: str, authenticator: Authenticator = UNAUTHENTICATED) -> None:
    """Find out before the training whether its result can be published.

    Raises:
        UserError: the destination cannot be written, has no create-only writes, is inside another run's adapter, or
            holds one, or a manifest that claims to be of this run and is not.
        StorageError: it is out of reach, or full.

    """
    store = open_store(uri, FIELD)
    own_manifest(store, run_uid, authenticator)
    if outer := published.enclosing_manifest(uri, FIELD):
        raise UserError(
            FIELD,
            store.uri(),
            f"is in a folder of the adapter that {outer} lists, which would no longer be what was published: choose "
            "a folder outside of it",
        )
    probe = f".write-check-{run_uid[:8]}"
    store.put(probe, b"")
    _check_create_only(store, probe)
    try:
        store.delete(probe)
    except UserError as error:
        log.warning("%s stays behind, deleting is not allowed: %s", store.uri(probe), error)


def check_apart_from_inputs(spec: QLoRAJobSpec) -> None:
    """Refuse a destination that is the base's folder, or among the rows, where it would be read as rows.

    Of a base, what lies in folders below its own is never read.

    Raises:
        UserError: names the field with the base or the rows.

    """
    destination, base = spec.output.destination, "spec.model.source"
    if is_place_in(destination, spec.model.source, base) and is_place_in(spec.model.source, destination, FIELD):
        raise UserError(FIELD, destination, f"is the folder of {base}: choose a folder of the adapter's own")
    sources = {"spec.dataset.train.source": spec.dataset.train.source}
    if spec.dataset.eval and spec.dataset.eval.source:
        sources["spec.dataset.eval.source"] = spec.dataset.eval.source
    for field, source in sources.items():
        if is_place_in(destination, source, field):
            raise UserError(
                FIELD,
                destination,
                f"is the folder of {field}, or in it: what is published there would be read as rows. Choose a folder "
                "outside of it, or name the file of the rows",
            )


def _check_create_only(store: Store, taken: str) -> None:
    """Try to create what is there already: of two writers of a manifest, one must fail.

    Raises:
        UserError: the server replaces it, or does not know such writes.
        StorageError: it is out of reach.

    """
    try:
        store.create(taken, b"")
    except AlreadyExistsError:
        return
    except UserError as error:
        cause = error.arguments[2].partition(": ")[2].partition(". ")[0]
        found = f"has a server that refuses create-only writes ({cause})"
    else:
        found = "has a server that ignores If-None-Match, so that two runs could publish over each other"
    raise UserError(
        store.field,
        store.uri(),
        f"{found}: choose a store with conditional writes, such as S3 itself, MinIO, Ceph or versitygw of today",
    )


def finished_run(config: TrainerConfig) -> TerminationMessage | None:
    """Return the termination message of a run that has published its adapter; None if there is still something to do.

    A pod may be killed between its manifest and its end, and whoever started it may lose the answer.

    Raises:
        UserError: the destination holds another run's adapter, or this run's is not what was published.
        AdapterRejectedError: what is there would not have passed the gate.
        StorageError: it is out of reach.

    """
    store = open_store(config.spec.output.destination, FIELD)
    there = own_manifest(store, config.job.uid, Authenticator.of(config))
    if there is None:
        return None
    adapter = verified(store, *there)
    check_gate(store, there[0], config.spec)
    metrics = there[0].metrics
    step, total, tokens = (int(metrics.get(name) or 0) for name in ("step", "totalSteps", "tokens"))
    loss = metrics.get("evalLoss")
    return TerminationMessage(
        exit_code=ExitCode.DONE,
        reason=Reason.COMPLETED,
        message=f"published by attempt {there[0].attempt} already: step {step} of {total}",
        progress=Progress(step=step, total_steps=total, best_eval_loss=None if loss is None else f"{loss:.6g}"),
        tokens=tokens,
        adapter=adapter,
    )


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


def own_manifest(
    store: Store, run_uid: str, authenticator: Authenticator = UNAUTHENTICATED
) -> tuple[Manifest, bytes] | None:
    """Return this run's manifest with its bytes; None where nothing is published yet.

    Raises:
        UserError: what is there is no manifest, another run's, or was not written by this run though it says so.

    """
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
    if problem := authenticator.problem_of_file(SIGNATURE_PURPOSE, data):
        raise UserError(
            store.field,
            store.uri(MANIFEST),
            f"says that this run has published it, but {problem}: somebody else who may write there has put it there, "
            "or changed it; find out who may write there, delete it and start the job again, or choose another "
            "destination",
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


def verified(store: Store, manifest: Manifest, data: bytes) -> Adapter:
    """Say where an adapter published earlier is, once everything it promises is there."""
    if problems := _problems(store, manifest, quick=True):
        raise UserError(
            store.field,
            store.uri(),
            f"holds this run's manifest, but {problems[0]}; delete {store.uri(MANIFEST)} and start the job again",
        )
    return published_adapter(store, manifest, data)


def check_gate(store: Store, manifest: Manifest, spec: QLoRAJobSpec) -> None:
    """Hold an adapter published earlier against the gate, as if it were to be published now.

    Raises:
        AdapterRejectedError: it does not pass.
        StorageError: it cannot be read.

    """
    from qlora_trainer.publish.gate import verify_adapter, verify_gain  # noqa: PLC0415 seconds of torch, and seldom needed

    base, own = (manifest.metrics.get(name) for name in ("baseEvalLoss", "evalLoss"))
    verify_gain(base, own, may_be_worse=spec.output.allow_worse_eval)
    with tempfile.TemporaryDirectory(prefix="qlora-published-") as name:
        folder = Path(name) / ADAPTER
        for file in manifest.files:
            if file.path.startswith(f"{manifest.adapter}/"):
                store.download_file(file.path, folder / file.path.removeprefix(f"{manifest.adapter}/"))
                if sha256_file(folder / file.path.removeprefix(f"{manifest.adapter}/")) != file.sha256:
                    raise StorageError(f"{store.uri(file.path)} has changed while it was read")
        verify_adapter(folder, None, spec.lora)


def published_adapter(store: Store, manifest: Manifest, data: bytes) -> Adapter:
    return Adapter(
        uri=store.uri(manifest.adapter), manifest_uri=store.uri(MANIFEST), manifest_sha256=sha256_bytes(data)
    )


def _problems(store: Store, manifest: Manifest, *, quick: bool = False) -> list[str]:
    """Return what is not as the manifest says. ``quick``: of a merged model, only sizes are compared."""
    files = [published.PublishedFile(file.path, file.size, file.sha256) for file in manifest.files]
    return published.differences(
        store,
        manifest.adapter,
        files,
        sizes_alone=lambda path: quick and not path.startswith(f"{manifest.adapter}/"),
        downloaded=not quick,
    )
