"""Folders on this machine and in object storage, to read published adapters from and to put rows into.

Both are stores of ``qlora_storage``, with credentials from the environment, named as in a job's Secret.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from qlora_cli.kube.errors import ClusterError
from qlora_storage.errors import JobError
from qlora_storage.folders import FolderBackend
from qlora_storage.local_paths import uri_problem, without_password
from qlora_storage.object_store import BUCKET_SCHEMES, NotFoundError, Store, open_store
from qlora_storage.published import PublishedFile, difference, differences, enclosing_manifest, unlisted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PATIENCE_SECONDS = 60.0
"""Longest time for which a command retries while a server is unreachable."""


class ArtifactError(ClusterError):
    """A place that cannot be read or written; says which, and what would help."""


class MissingError(ArtifactError):
    """No such object."""


class Folder:
    """Place that objects are read from and written to."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def uri(self, key: str) -> str:
        return self._store.uri(key)

    def size(self, key: str) -> int:
        """Return the bytes of an object.

        Raises:
            MissingError: there is none.

        """
        with _errors():
            found = self._store.stat(key)
            if found is None:
                raise NotFoundError(self.uri(key))
        return found.size

    def chunks(self, key: str) -> Iterator[bytes]:
        """Content of an object in pieces.

        Raises:
            MissingError: there is none.

        """
        with _errors():
            yield from self._store.chunks(key)

    def put(self, key: str, path: Path) -> None:
        """Write a file's content."""
        with _errors():
            self._store.put(key, path)

    def difference(self, key: str, file: PublishedFile) -> str | None:
        """Say how an object differs from a file of a manifest; None where it does not."""
        with _errors():
            found = self._store.stat(key)
            return difference(self._store, key, file, found.size if found else None)

    def differences(
        self, adapter: str, files: Iterable[PublishedFile], tell: Callable[[str], None], *, content: bool = True
    ) -> list[str]:
        """Compare what is there with what a manifest lists, and return a line for each difference."""
        with _errors():
            return differences(self._store, adapter, files, tell, sizes_alone=lambda _: not content)

    def unlisted(self, files: Iterable[PublishedFile]) -> list[str]:
        """Return the paths in a download's folders that no file of its manifest has."""
        with _errors():
            return unlisted(self._store, files)


class LocalFolder(Folder):
    """On this machine."""

    def __init__(self, root: Path) -> None:
        super().__init__(Store(FolderBackend(root), str(root), "", PATIENCE_SECONDS))
        self.root = root


@contextmanager
def _errors() -> Iterator[None]:
    """Turn the errors of stores into the command line's."""
    try:
        yield
    except NotFoundError as error:
        raise MissingError(f"{error.args[0]}: is not there") from None
    except JobError as error:
        raise ArtifactError(str(error)) from None


def open_folder(uri: str) -> Folder:
    """Open a folder by URI or path.

    Raises:
        ArtifactError: it cannot be reached from here.

    """
    if problem := uri_problem(uri):
        raise ArtifactError(f"{without_password(uri) or 'the URI'}: {problem}")
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return LocalFolder(Path(rest if separator else uri))
    if scheme == "pvc":
        raise ArtifactError(
            f"{uri}: only pods of its namespace reach a claim; copy it out of one that mounts it (kubectl cp)"
        )
    if scheme not in BUCKET_SCHEMES:
        raise ArtifactError(f"{uri}: must be a folder, or start with s3://, gs:// or az://")
    with _errors():
        return Folder(open_store(uri, "", PATIENCE_SECONDS))


def check_outside_adapters(place: str) -> None:
    """Refuse to write into a folder that is verified as a published adapter.

    Raises:
        ArtifactError: names the manifest.

    """
    with _errors():
        outer = enclosing_manifest(place, "")
    if outer:
        raise ArtifactError(f"{place}: is in a folder of the adapter that {outer} lists; choose a folder outside of it")


def upload(source: Path, target: str) -> list[str]:
    """Copy a file, or all files of a folder, into object storage; return the URIs.

    Raises:
        ArtifactError: nothing there, or the target cannot be written.

    """
    scheme, separator, rest = target.partition("://")
    if not separator or scheme not in BUCKET_SCHEMES:
        raise ArtifactError(f'"{target}": must start with s3://, gs:// or az://')
    if not source.exists():
        raise ArtifactError(f"{source}: there is no such file or folder")
    if source.is_file():
        bucket, _, key = rest.partition("/")
        place = PurePosixPath(bucket, f"{key}{source.name}" if not key or key.endswith("/") else key)
        folder, files = open_folder(f"{scheme}://{place.parent}"), {place.name: source}
    else:
        folder = open_folder(target)
        files = {p.relative_to(source).as_posix(): p for p in sorted(source.rglob("*")) if p.is_file()}
    if not files:
        raise ArtifactError(f"{source}: holds no files")
    check_outside_adapters(target)
    for name, path in files.items():
        folder.put(name, path)
    return [folder.uri(name) for name in files]
