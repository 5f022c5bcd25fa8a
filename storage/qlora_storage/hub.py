"""Models and rows from the Hugging Face Hub, pinned to the commit they were read at."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from huggingface_hub import HfApi, constants, get_token, hf_hub_url, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP library's own
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported without being listed
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from qlora_storage.backend import Fault, FaultKind
from qlora_storage.errors import NotFoundError, StorageError, UserError
from qlora_storage.metadata_addresses import REFUSED, leads_to_metadata
from qlora_storage.retry import PATIENCE_SECONDS, FaultError, call_patiently
from qlora_storage.store_settings import PLAIN_URL, SettingError, check_variables, is_url

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from huggingface_hub import DatasetInfo, ModelInfo

SECONDS = 60
"""Longest wait for the next bytes of an answer."""
DEFAULT_ENDPOINT = "https://huggingface.co"

_SOURCE = re.compile(r"^hf://(?:datasets/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<path>[^@]+))?$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_QUERY = re.compile(r"(?<=\S)\?[^\s'\"<>]*=[^\s'\"<>]*")
T = TypeVar("T")


@dataclass(frozen=True)
class HubSource:
    """``hf://org/name@revision/path``; a slash in a revision is written %2F."""

    field: str
    source: str
    kind: str
    """"model" or "dataset"."""
    repo: str
    revision: str
    path: str
    patience_seconds: float | None = None
    """Longest time for which the Hub may be unreachable; None: PATIENCE_SECONDS."""


@dataclass(frozen=True)
class HubFolder:
    """A repository at one commit."""

    source: HubSource
    commit: str
    names: tuple[str, ...]
    """Every file's path."""
    snapshot: Path | None = None
    """With HF_HUB_OFFLINE: the folder of the Hub's own cache that holds the files."""

    def download(self, names: list[str], folder: Path) -> None:
        """Bring files into ``folder``; those that are there from an earlier try are not fetched again.

        Raises:
            UserError: the Hub does not give them.
            StorageError: the Hub fails, or the disk is full.

        """
        at = self.source
        if self.snapshot:
            _copy(self.snapshot, names, folder)
            return
        _asked(
            at,
            lambda: snapshot_download(
                at.repo,
                repo_type=at.kind,
                revision=self.commit,
                local_dir=folder,
                allow_patterns=[re.sub(r"([\[*?])", r"[\1]", name) for name in names],
                endpoint=endpoint(),
            ),
        )

    def read(self, name: str, start: int, end: int) -> tuple[bytes, int]:
        """Return bytes [start, end) of a file, or fewer where it ends before; with its size.

        Raises:
            NotFoundError: there is no such file.
            UserError: the Hub does not give them.
            StorageError: the Hub fails.

        """
        at = self.source
        if self.snapshot:
            return _read_part(self.snapshot / name, start, end)
        url = hf_hub_url(at.repo, name, repo_type=at.kind, revision=self.commit, endpoint=endpoint())
        wanted = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}

        def ask() -> tuple[bytes, int]:
            with get_session().stream("GET", url, headers=wanted, follow_redirects=True, timeout=SECONDS) as answer:
                if answer.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # it ends before
                    return b"", _size(answer.headers, part=True) or 0
                hf_raise_for_status(answer)
                part = answer.status_code == HTTPStatus.PARTIAL_CONTENT
                size = _size(answer.headers, part=part)
                if part and size is None:
                    raise StorageError(f"{at.field}: {at.source}: {endpoint()} does not say how large {name} is")
                skip, body, seen = 0 if part else start, bytearray(), 0
                for piece in answer.iter_bytes():  # a server may answer a range with the whole file
                    seen += len(piece)
                    if len(body) < skip + end - start:
                        body += piece
                    if size is not None and len(body) >= skip + end - start:
                        break
            return bytes(body[skip : skip + end - start]), seen if size is None else size

        return _asked(at, ask)

    @staticmethod
    def tidy(folder: Path) -> None:
        """Delete the notes the Hub's client leaves in the folder."""
        shutil.rmtree(folder / ".cache", ignore_errors=True)


def _copy(snapshot: Path, names: list[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(snapshot / name, folder / name)  # what the links of the cache lead to


def _read_part(path: Path, start: int, end: int) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start), path.stat().st_size
    except FileNotFoundError as error:
        raise NotFoundError(str(path)) from error


def _size(headers: Mapping[str, str], *, part: bool) -> int | None:
    """Return the bytes of the whole file; None where the answer does not say, being sent in chunks."""
    text = headers.get("Content-Range", "").rpartition("/")[2] if part else headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def parse(source: str, field: str, kind: str, patience_seconds: float | None = None) -> HubSource:
    """Take an ``hf://`` URI apart.

    Args:
        source: the URI.
        field: path of the manifest's field, for messages.
        kind: ``model`` or ``dataset``.
        patience_seconds: how long the Hub may be away.

    Raises:
        UserError: it is none.

    """
    match = _SOURCE.match(source)
    if not match:
        raise UserError(field, source, "must read hf://org/name or hf://org/name@revision")
    path = (match["path"] or "").strip("/")
    if ".." in path.split("/"):
        raise UserError(field, source, "must not contain ..")
    return HubSource(field, source, kind, match["repo"], unquote(match["revision"] or "main"), path, patience_seconds)


def commit_of(source: HubSource) -> str:
    """Resolve the revision to a commit; a commit is taken as it is, without asking.

    Raises:
        UserError: the repository or revision is not there, not for us, or the Hub is out of reach.
        StorageError: the Hub fails.

    """
    if _COMMIT.match(source.revision):
        return source.revision
    if constants.HF_HUB_OFFLINE:
        return _snapshot(source, source.revision).name
    return str(_info(source, source.revision).sha)


def open_folder(source: HubSource, commit: str) -> HubFolder:
    """List the repository's files at a commit.

    Raises:
        UserError: as :func:`commit_of`.
        StorageError: as :func:`commit_of`.

    """
    if constants.HF_HUB_OFFLINE:
        snapshot = _snapshot(source, commit)
        files = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
        return HubFolder(source, commit, tuple(files), snapshot)
    return HubFolder(source, commit, tuple(file.rfilename for file in _info(source, commit).siblings or ()))


def open_unlisted(source: HubSource) -> HubFolder:
    """Open the repository at its revision for reading files by name, without asking for the list of them.

    Raises:
        UserError: HF_HUB_OFFLINE is set, and the Hub's cache does not have it.

    """
    snapshot = _snapshot(source, source.revision) if constants.HF_HUB_OFFLINE else None
    return HubFolder(source, source.revision, (), snapshot)


def _snapshot(source: HubSource, revision: str) -> Path:
    """Return the folder of the Hub's own cache that holds a revision."""
    try:
        return Path(snapshot_download(source.repo, repo_type=source.kind, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        repo_type = "" if source.kind == "model" else f"--repo-type {source.kind} "
        raise UserError(
            source.field,
            source.source,
            f"is not in the cache {constants.HF_HUB_CACHE} at revision {revision}, and HF_HUB_OFFLINE is set: fetch it "
            f"where there is a way out, by 'hf download {repo_type}{source.repo} --revision {revision}'",
        ) from error


def _info(source: HubSource, revision: str) -> ModelInfo | DatasetInfo:
    # The one request that carries both commit and names, and the one that the Hub's client does not repeat by itself.
    api = HfApi(endpoint=endpoint())
    if source.kind == "dataset":
        return _asked(source, lambda: api.dataset_info(source.repo, revision=revision))
    return _asked(source, lambda: api.model_info(source.repo, revision=revision))


def endpoint() -> str:
    """Return the URL of the Hub.

    Raises:
        UserError: HF_ENDPOINT is no URL, or one of a server that no job may use.

    """
    named = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/")
    if named and not is_url(named):
        raise UserError("HF_ENDPOINT", None, f"must be a URL such as https://huggingface.co, {PLAIN_URL}")
    if named and leads_to_metadata(named, os.environ):
        raise UserError("HF_ENDPOINT", None, REFUSED)
    return named or DEFAULT_ENDPOINT


def _asked(source: HubSource, call: Callable[[], T]) -> T:
    """Run ``call``, again while the Hub may recover; raise this package's errors."""
    token = get_token() or ""
    if not (token.isascii() and token.isprintable()):
        allowed = f"cannot be asked for: HF_TOKEN has a character that no token has; check it in {_secret(source)}"
        raise UserError(source.field, source.source, allowed)
    try:
        check_variables({"HF_TOKEN": token})
    except SettingError as error:
        raise UserError(
            source.field, source.source, f"cannot be asked for: {error}; check it in {_secret(source)}"
        ) from None
    patience = PATIENCE_SECONDS if source.patience_seconds is None else source.patience_seconds
    try:
        return call_patiently(call, _fault_of, f"fetch {source.source}", patience)
    except FaultError as error:
        cause = error.__cause__
        raise _translated(source, cause if isinstance(cause, Exception) else error) from cause


def _secret(source: HubSource) -> str:
    return (
        f"the Secret named by {source.field.rpartition('.')[0]}.credentials (in a cluster) or in your shell (qlora run)"
    )


def _fault_of(error: Exception) -> Fault | None:
    if not isinstance(error, HTTPError | HFValidationError | OSError):
        return None
    kind = FaultKind.TRANSIENT if _may_recover(error) else FaultKind.FINAL
    wait = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return Fault(kind, without_queries(error), retry_after=float(wait) if wait.isdecimal() else None)


def without_queries(error: Exception) -> str:
    """Return an error's text with URLs without what follows their question mark: it may let whoever reads it in."""
    return _QUERY.sub("?…", str(error))


def _may_recover(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return isinstance(error, HTTPError | LocalEntryNotFoundError) and not isinstance(error, OfflineModeIsEnabled)


def _translated(source: HubSource, error: Exception) -> UserError | StorageError | NotFoundError:
    secret = _secret(source)
    text = without_queries(error)
    page = f"{endpoint()}/{'datasets/' if source.kind == 'dataset' else ''}{source.repo}"

    def user(text: str) -> UserError:
        return UserError(source.field, source.source, text)

    if isinstance(error, GatedRepoError):
        return user(f"is gated: accept its terms at {page}, and set an HF_TOKEN that may read it in {secret}")
    if isinstance(error, RepositoryNotFoundError):
        return user(f"is not a {source.kind} on {endpoint()}, or a private one: then set HF_TOKEN in {secret}")
    if isinstance(error, RevisionNotFoundError):
        return user(f"has no revision {source.revision}; {page}/commits/main lists them")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return NotFoundError(source.source)
    if isinstance(error, HFValidationError):
        return user(f"is not a name the Hub knows: {text}")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == HTTPStatus.NOT_FOUND:  # of a mirror that gives no X-Error-Code
            return NotFoundError(source.source)
        if status in (401, 403):
            return user(f"may not be read with this HF_TOKEN ({status}); check it in {secret}")
        return StorageError(f"{source.field}: {source.source}: {endpoint()} answers {status}: {text}")
    if isinstance(error, HTTPError | LocalEntryNotFoundError | OfflineModeIsEnabled):
        return user(
            f"cannot be fetched: {endpoint()} cannot be reached ({type(error).__name__}). Allow outbound access to it, "
            "or copy the files to s3://, gs://, az:// or pvc:// and use that location"
        )
    return StorageError(f"{source.field}: {source.source}: cannot be written to the cache: {text}")
