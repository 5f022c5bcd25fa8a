"""A base model's ``config.json`` and the headers of its weights, wherever it is: kilobytes of gigabytes.

All is read over ranges, so that weights are never downloaded.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qlora_api.errors import FieldError
from qlora_memory import HeaderError, header_length, parse_header, shard_names
from qlora_memory.shape.safetensors_headers import INDEX_FILE, LENGTH_BYTES, SINGLE_FILE
from qlora_storage.errors import JobError, NotFoundError, UserError
from qlora_storage.local_paths import expand_home
from qlora_storage.object_store import BUCKET_SCHEMES, open_store

if TYPE_CHECKING:
    from qlora_memory import TensorInfo

FIELD = "spec.model.source"
CONFIG = "config.json"
FIRST_READ = 128 * 1024
"""Bytes asked for at once: most headers are shorter, so that one request does."""
MOST_BYTES = 64 << 20
"""Largest config.json or index that is read."""
AT_ONCE = 8
PATIENCE_SECONDS = 20.0
"""Longest time for which a plan retries while a server is unreachable."""
ELSEWHERE = ". Offline? Pass a downloaded configuration: --model-config config.json"


@dataclass(frozen=True)
class ModelFiles:
    """Files of a base that are known without its weights."""

    config: dict[str, Any]
    tensors: dict[str, TensorInfo] | None
    """None: the configuration alone is known."""
    place: str
    """Description of the place that it was read from."""


class ModelSource(Protocol):
    """Somewhere that files can be read from in part."""

    name: str

    def read(self, file: str, start: int, end: int | None) -> bytes | None:
        """Return bytes [start, end) of a file, to its end for None; None where there is no such file."""


def read_model(source: str) -> ModelFiles:
    """Read what a plan needs of ``spec.model.source``.

    Raises:
        FieldError: it is not there, may not be read, or holds no safetensors model.

    """
    try:
        place = _open(source)
        config = _config(place)
        files = _weights(place)
        if files is None:
            return ModelFiles(config, None, f"{place.name}, {CONFIG} alone: there are no safetensors weights")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            headers = list(pool.map(lambda file: _header(place, file), files))
    except HeaderError as error:
        raise FieldError(FIELD, source, str(error)) from None
    except UserError as error:
        raise FieldError(FIELD, source, f"{error.error.allowed}{ELSEWHERE}") from None
    except JobError as error:
        raise FieldError(FIELD, source, f"{error}{ELSEWHERE}") from None
    return ModelFiles(config, {name: info for header in headers for name, info in header.items()}, place.name)


def _config(place: ModelSource) -> dict[str, Any]:
    content = place.read(CONFIG, 0, None)
    if content is None:
        raise HeaderError(f"has no {CONFIG} ({place.name})")
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise HeaderError(f"has a {CONFIG} that is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise HeaderError(f"has a {CONFIG} that is not a JSON object")
    return parsed


def read_config(path: Path) -> ModelFiles:
    """Return a ``config.json`` alone, or that of a folder: for a plan without the model.

    Raises:
        FieldError: it cannot be read.

    """
    path = path / CONFIG if path.is_dir() else path
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FieldError("--model-config", path, f"cannot be read: {error}") from None
    if not isinstance(parsed, dict):
        raise FieldError("--model-config", path, "is not a JSON object")
    return ModelFiles(parsed, None, f"{path} alone")


def _weights(place: ModelSource) -> list[str] | None:
    """Return the names of the files of weights; None where there are none of safetensors."""
    if place.read(SINGLE_FILE, 0, LENGTH_BYTES) is not None:
        return [SINGLE_FILE]
    index = place.read(INDEX_FILE, 0, None)
    if index is None:
        return None
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
        folder = expand_home(rest if separator else source)
        if not folder.is_dir():
            raise FieldError(FIELD, folder, "is not a folder" if folder.exists() else "does not exist")
        return _Store(str(folder))
    if scheme == "hf":
        return _Hub(source)
    if scheme in BUCKET_SCHEMES:
        return _Store(source)
    raise FieldError(
        FIELD, source, "is a volume of a cluster: copy its config.json here and pass it with --model-config config.json"
    )


class _Store:
    """A folder, or ``s3://``, ``gs://`` and ``az://`` with the credentials of the environment."""

    def __init__(self, source: str) -> None:
        self.name = source
        self._store = open_store(source, FIELD, PATIENCE_SECONDS)

    def read(self, file: str, start: int, end: int | None) -> bytes | None:
        try:
            return self._store.get(file) if end is None else self._store.read(file, start, end)[0]
        except NotFoundError:
            return None


class _Hub:
    """``hf://org/name@revision``: HF_ENDPOINT and HF_TOKEN count, as for huggingface_hub."""

    def __init__(self, source: str) -> None:
        from qlora_storage import hub  # noqa: PLC0415 a third of a second, for nothing where the Hub is not asked

        at = hub.parse(source, FIELD, "model", PATIENCE_SECONDS)
        if at.path:
            raise UserError(FIELD, source, "must read hf://org/name or hf://org/name@revision")
        self.name = f"{at.repo} at {at.revision} on {hub.endpoint()}"
        self._folder = hub.open_unlisted(at)

    def read(self, file: str, start: int, end: int | None) -> bytes | None:
        try:
            return self._folder.read(file, start, MOST_BYTES if end is None else end)[0]
        except NotFoundError:
            return None
