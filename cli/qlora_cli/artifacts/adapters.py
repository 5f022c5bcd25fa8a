"""Published adapters: fetch one, or hold it against its manifest, byte by byte and without torch.

The manifest is what the trainer wrote last, create-only; ``status.adapter`` has its hash, and so vouches for all of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qlora_cli.artifacts.storage import ArtifactError, LocalFolder, check_outside_adapters, open_folder
from qlora_cli.jobs.job_view import read_run, view, view_run
from qlora_cli.kube.errors import ClusterError, KubeApiError
from qlora_cli.kube.names import core_path, is_name
from qlora_cli.kube.target import program
from qlora_storage.local_paths import whole_file
from qlora_storage.published import ADAPTER, MERGED, MOST_MANIFEST_BYTES, PublishedFile, is_inside, short_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from qlora_cli.artifacts.storage import Folder
    from qlora_cli.jobs.job_view import JobView
    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster

MANIFEST = "manifest.json"
SCHEMA = "qlora.dev/manifest/v1"
REQUIRED = ("adapter_config.json", "adapter_model.safetensors")
"""Files that every adapter has."""
ELSEWHERE = "download into an empty folder, or delete it"


@dataclass(frozen=True)
class PublishedAdapter:
    """A manifest that was read, and where."""

    folder: Folder
    data: bytes
    body: Object
    files: tuple[PublishedFile, ...]

    @property
    def adapter(self) -> str:
        """Folder of the adapter, relative to the manifest's."""
        return str(self.body["adapter"])


@dataclass(frozen=True)
class Source:
    """Location of a manifest, and its hash where somebody vouches for one."""

    folder_uri: str
    sha256: str = ""


def source_of(reference: str, job: Object | None) -> Source:
    """From what a person names (a job, a run's folder, a published folder, a manifest) to the place of a manifest.

    Raises:
        ClusterError: the job or run has published nothing yet.

    """
    if job is not None:
        return _published_by(view(job))
    if "://" in reference or reference.endswith(MANIFEST) or not (Path(reference) / "run.json").exists():
        return Source(reference.removesuffix(MANIFEST).rstrip("/") or ("/" if reference.startswith("/") else "."))
    return _published_by(view_run(Path(reference), read_run(Path(reference))))


def _published_by(job: JobView) -> Source:
    uri = job.adapter.get("manifestUri", "")
    if not uri:
        after = f"{program()} show {job.place}" if job.is_finished else f"{program()} watch {job.place}"
        raise ClusterError(f"\"{job.place}\" has published no adapter, it is {job.state} ({job.reason}); see '{after}'")
    return Source(uri.removesuffix(MANIFEST).rstrip("/"), job.adapter.get("manifestSha256", ""))


def read(source: Source) -> PublishedAdapter:
    """Read the manifest and check its hash and its form.

    Raises:
        ArtifactError: it is not there, or is not what was published.

    """
    folder = open_folder(source.folder_uri)
    where = folder.uri(MANIFEST)
    if folder.size(MANIFEST) > MOST_MANIFEST_BYTES:
        raise ArtifactError(f"{where}: is too large to be a manifest")
    data = b"".join(folder.chunks(MANIFEST))
    digest = hashlib.sha256(data).hexdigest()
    if source.sha256 and digest != source.sha256:
        raise ArtifactError(
            f"{where}: is not the manifest that the job published: its SHA-256 is {digest[:12]}…, "
            f"and status.adapter says {source.sha256[:12]}…"
        )
    body = _parsed(where, data)
    files = tuple(PublishedFile(file["path"], file["size"], file["sha256"]) for file in body["files"])
    if problem := _problem_of_layout(body["adapter"], files):
        raise ArtifactError(f"{where}: {problem}")
    return PublishedAdapter(folder, data, body, files)


def _parsed(where: str, data: bytes) -> Object:
    """Return a manifest of the schema and form that this version reads.

    Raises:
        ArtifactError: it is another one.

    """
    from qlora_api.errors import ManifestError, validate  # noqa: PLC0415 other commands of a cluster need no pydantic
    from qlora_cli.records.adapter_manifest import RecordedManifest  # noqa: PLC0415

    try:
        body: Object = json.loads(data)
        schema = body["schema"]
        if schema == SCHEMA:
            validate(RecordedManifest, body)
    except ManifestError as error:
        raise ArtifactError(f"{where}: is no manifest of this operator: {error.errors[0]}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ArtifactError(f"{where}: is no manifest of this operator") from None
    if schema != SCHEMA:
        raise ArtifactError(f'{where}: schema "{schema}" is not known here; this version reads {SCHEMA}')
    return body


def _problem_of_layout(adapter: str, files: Sequence[PublishedFile]) -> str:
    """Say where the files of a manifest are not an adapter, and perhaps a merged model, in one attempt's folder."""
    if not is_inside(adapter) or short_path(adapter) != ADAPTER:
        return f'adapter must be the folder "{ADAPTER}" of an attempt beside it, not "{adapter}"'
    attempt = adapter.removesuffix(ADAPTER)
    for file in files:
        if not is_inside(file.path):
            return f'names "{file.path}", which leaves its folder'
        if not file.path.startswith((f"{adapter}/", f"{attempt}{MERGED}/")):
            return f'names "{file.path}", which is in neither of {adapter}, {attempt}{MERGED}'
    paths = [file.path for file in files]
    if twice := next((path for path, count in Counter(paths).items() if count > 1), ""):
        return f'names "{twice}" twice'
    lacks = next((name for name in REQUIRED if f"{adapter}/{name}" not in paths), "")
    return f"names no {adapter}/{lacks}, without which there is no adapter" if lacks else ""


# ------------------------------------------------------------------------------------------------------------ verifying


def verify(published: PublishedAdapter, tell: Callable[[str], None]) -> list[str]:
    """Read every file of the folders that will be used; return a line for each difference."""
    return published.folder.differences(published.adapter, published.files, tell)


# ---------------------------------------------------------------------------------------------------------- downloading


def download(
    published: PublishedAdapter, target: Path, tell: Callable[[str], None], *, adapter_only: bool = False
) -> tuple[int, int]:
    """Copy all files, each checked before it has its name, the manifest last; files and bytes copied now.

    Raises:
        ArtifactError: a file is not what was published, or the folder holds something else.
        OSError: a file cannot be written.

    """
    check_outside_adapters(str(target))
    count = copied = 0
    here = LocalFolder(target)
    if foreign := here.unlisted(published.files):
        raise ArtifactError(f"{target}: {foreign[0]} is not in the manifest; {ELSEWHERE}")
    if (target / MANIFEST).exists() and (target / MANIFEST).read_bytes() != published.data:
        raise ArtifactError(f"{target}: holds another adapter, its {MANIFEST} differs; {ELSEWHERE}")
    for file in published.files:
        if adapter_only and not file.path.startswith(f"{published.adapter}/"):
            continue
        short = short_path(file.path)
        if (target / short).is_file() and here.difference(short, file) is None:
            continue  # an earlier call brought it
        tell(file.path)
        _copy(published.folder, file, target / short)
        count, copied = count + 1, copied + file.size
    if problems := here.differences(published.adapter, published.files, lambda _: None, content=False):
        raise ArtifactError(f"{target}: {problems[0]}; {ELSEWHERE}")
    _write(target / MANIFEST, [published.data])
    return count, copied


def _copy(folder: Folder, file: PublishedFile, target: Path) -> None:
    digest, size = hashlib.sha256(), 0

    def checked() -> Iterator[bytes]:
        nonlocal size
        for piece in folder.chunks(file.path):
            digest.update(piece)
            size += len(piece)
            yield piece
        if size != file.size or digest.hexdigest() != file.sha256:
            raise ArtifactError(f"{folder.uri(file.path)}: is not what was published; the adapter must not be used")

    _write(target, checked())


def _write(target: Path, pieces: Any) -> None:
    """Write a file as a whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        for piece in pieces:
            file.write(piece)


def default_folder(published: PublishedAdapter) -> Path:
    """Return a folder named after the job; a name that no job has, such as a path, does not count."""
    name = str(published.body.get("job"))
    return Path(name if is_name(name) else "adapter")


def folder_of(published: PublishedAdapter, target: Path) -> Path:
    """Return where the adapter itself is after a download."""
    return target / PurePosixPath(short_path(f"{published.adapter}"))


# ---------------------------------------------------------------------------------------------------------- credentials


def use_secret(cluster: Cluster, job: Object) -> str:
    """Put the object storage's credentials of the job's own Secret into the environment; the Secret's name.

    Raises:
        ClusterError: the job names none, or it may not be read.

    """
    from qlora_api.credentials import KEYS  # noqa: PLC0415 the API's types, which nothing else here needs

    name = ((job.get("spec") or {}).get("output") or {}).get("credentials")
    if not name:
        raise ClusterError("--secret: the job names none in spec.output.credentials")
    try:
        secret = cluster.api.get(core_path(cluster.namespace, "secrets", name))
    except KubeApiError as error:
        raise ClusterError(f"--secret: Secret {name}: {error}") from None
    for key, value in (secret.get("data") or {}).items():
        if key in KEYS:
            os.environ[key] = base64.b64decode(value).decode(errors="replace")
    return str(name)
