"""A base model's ``config.json`` and the headers of its weights, wherever it is: kilobytes of gigabytes.

A folder is read from disk, ``hf://`` over ranged requests of HTTPS, object storage over obstore's. Weights are never
downloaded.
"""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qlora_api.errors import FieldError
from qlora_memory import HeaderError, header_length, parse_header, shard_names
from qlora_memory.shape.safetensors_headers import INDEX_FILE, LENGTH_BYTES, SINGLE_FILE

if TYPE_CHECKING:
    import httpx

    from qlora_memory import TensorInfo

FIELD = "spec.model.source"
CONFIG = "config.json"
DEFAULT_ENDPOINT = "https://huggingface.co"
FIRST_READ = 128 * 1024
"""Bytes asked for at once: most headers are shorter, so that one request does."""
AT_ONCE = 8
SECONDS = 20.0
_HUB = re.compile(r"^hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/@]+))?$")
BUCKETS = ("s3", "gs", "az")


@dataclass(frozen=True)
class ModelFiles:
    """Files of a base that are known without its weights."""

    config: dict[str, Any]
    tensors: dict[str, TensorInfo] | None
    """None: the configuration alone is known."""
    place: str
    """Where it was read, in words."""


class ModelSource(Protocol):
    """Somewhere that files can be read from in part."""

    name: str

    def read(self, file: str, start: int, end: int | None) -> bytes | None:
        """Bytes [start, end) of a file, to its end for None; None where there is no such file."""

    def close(self) -> None: ...


def read_model(source: str) -> ModelFiles:
    """Read what a plan needs of ``spec.model.source``.

    Raises:
        FieldError: it is not there, may not be read, or holds no safetensors model.

    """
    with closing(_open(source)) as place:
        config = place.read(CONFIG, 0, None)
        if config is None:
            raise FieldError(FIELD, source, f"has no {CONFIG} ({place.name})")
        try:
            parsed = json.loads(config)
            files = _weights(place)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                headers = list(pool.map(lambda file: _header(place, file), files))
        except HeaderError as error:
            raise FieldError(FIELD, source, str(error)) from None
        except ValueError as error:
            raise FieldError(FIELD, source, f"has a {CONFIG} that is not JSON: {error}") from None
    return ModelFiles(parsed, {name: info for header in headers for name, info in header.items()}, place.name)


def read_config(path: Path) -> ModelFiles:
    """A ``config.json`` alone: for a plan without the model.

    Raises:
        FieldError: it cannot be read.

    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FieldError("--model-config", path, f"cannot be read: {error}") from None
    if not isinstance(parsed, dict):
        raise FieldError("--model-config", path, "is not a JSON object")
    return ModelFiles(parsed, None, f"{path} alone")


def _weights(place: ModelSource) -> list[str]:
    if place.read(SINGLE_FILE, 0, LENGTH_BYTES) is not None:
        return [SINGLE_FILE]
    index = place.read(INDEX_FILE, 0, None)
    if index is None:
        raise HeaderError(f"has neither {SINGLE_FILE} nor {INDEX_FILE} ({place.name})")
    try:
        return shard_names(index)
    except HeaderError as error:
        raise HeaderError(f"has a {INDEX_FILE} that {error}") from None


def _header(place: ModelSource, file: str) -> dict[str, TensorInfo]:
    first = place.read(file, 0, FIRST_READ)
    if first is None:
        raise HeaderError(f"lacks {file}, which {INDEX_FILE} names")
    try:
        end = LENGTH_BYTES + header_length(first)
        rest = (place.read(file, len(first), end) or b"") if end > len(first) else b""
        return parse_header((first + rest)[LENGTH_BYTES:end])
    except HeaderError as error:
        raise HeaderError(f"has a {file} that {error}") from None


# --------------------------------------------------------------------------------------------------------------- places


def _open(source: str) -> ModelSource:
    scheme, separator, rest = source.partition("://")
    if not separator or scheme == "file":
        return _Folder(Path(rest if separator else source).expanduser())
    if scheme == "hf":
        return _Hub(source)
    if scheme in BUCKETS:
        return _Bucket(source)
    raise FieldError(
        FIELD, source, "is a volume of a cluster: copy its config.json here and plan with --model-config config.json"
    )


class _Folder:
    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FieldError(FIELD, folder, "is not a folder" if folder.exists() else "does not exist")
        self.folder = folder
        self.name = str(folder)

    def read(self, file: str, start: int, end: int | None) -> bytes | None:
        path = self.folder / file
        if not path.is_file():
            return None
        with path.open("rb") as opened:
            opened.seek(start)
            return opened.read() if end is None else opened.read(end - start)

    def close(self) -> None:
        """Nothing is open."""


class _Hub:
    """``hf://org/name@revision``: HF_ENDPOINT and HF_TOKEN count, as for huggingface_hub."""

    def __init__(self, source: str) -> None:
        import httpx  # noqa: PLC0415 of the cli extra, and slow to load

        match = _HUB.match(source)
        if match is None:
            raise FieldError(FIELD, source, "must read hf://org/name or hf://org/name@revision")
        self.source = source
        endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self.url = f"{endpoint}/{match['repo']}/resolve/{match['revision'] or 'main'}"
        self.name = f"{match['repo']} at {match['revision'] or 'main'} on {endpoint}"
        token = os.environ.get("HF_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._errors = (httpx.HTTPError, httpx.InvalidURL)
        self._client: httpx.Client = httpx.Client(headers=headers, follow_redirects=True, timeout=SECONDS)

    def read(self, file: str, start: int, end: int | None) -> bytes | None:
        wanted = {"Range": f"bytes={start}-{end - 1}"} if end is not None else {}
        try:
            with self._client.stream("GET", f"{self.url}/{file}", headers=wanted) as answer:
                if answer.status_code == 404 and answer.headers.get("X-Error-Code") in (None, "EntryNotFound"):
                    return None
                if answer.status_code == 416:  # nothing from there on
                    return b""
                if answer.status_code not in (200, 206):
                    raise FieldError(FIELD, self.source, self._refused(answer))
                skip = start if answer.status_code == 200 else 0
                return _take(answer, skip, None if end is None else end - start)
        except self._errors as error:
            raise FieldError(
                FIELD,
                self.source,
                f"cannot be asked ({type(error).__name__}): plan with --model-config config.json where there is no way "
                "out",
            ) from None

    def _refused(self, answer: httpx.Response) -> str:
        code = answer.headers.get("X-Error-Code", "")
        if answer.status_code in (401, 403):
            return f"is gated or private ({answer.status_code}): put an HF_TOKEN that may read it into the environment"
        if answer.status_code == 404:
            return f"is not there ({code or 404}): {self.url}"
        return f"is not given: {self.url} answers {answer.status_code}"

    def close(self) -> None:
        self._client.close()


def _take(answer: httpx.Response, skip: int, count: int | None) -> bytes:
    """No more of the body than is wanted: a server may answer a range with the whole file."""
    if count is None:
        return answer.read()[skip:]
    taken = bytearray()
    for piece in answer.iter_bytes():
        taken += piece
        if len(taken) >= skip + count:
            break
    return bytes(taken[skip : skip + count])


class _Bucket:
    """``s3://``, ``gs://`` and ``az://`` through obstore, where it is installed; credentials of the environment."""

    def __init__(self, source: str) -> None:
        try:
            import obstore  # noqa: PLC0415 not part of the command line's own needs
            from obstore.store import from_url  # noqa: PLC0415
        except ImportError:
            raise FieldError(
                FIELD,
                source,
                "needs the package obstore to be looked at (pip install obstore), or its config.json with "
                "--model-config",
            ) from None
        self.source, self.name = source, source
        self._obstore: Any = obstore
        http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
        try:
            self._store: Any = from_url(source, client_options={"allow_http": http})
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise FieldError(FIELD, source, f"cannot be opened: {error}") from None

    def read(self, file: str, start: int, end: int | None) -> bytes | None:
        try:
            if end is None:
                return bytes(self._obstore.get(self._store, file).bytes())
            size = int(self._obstore.head(self._store, file)["size"])
            return bytes(self._obstore.get_range(self._store, file, start=start, end=min(end, size)))
        except (FileNotFoundError, self._obstore.exceptions.NotFoundError):
            return None
        except self._obstore.exceptions.BaseError as error:
            raise FieldError(FIELD, self.source, f"cannot be read: {error}") from None

    def close(self) -> None:
        """obstore closes by itself."""
