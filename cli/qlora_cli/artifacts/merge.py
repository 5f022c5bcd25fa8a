"""``qlora merge``: an adapter merged into its base, by a process of the trainer's."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.artifacts import adapters
from qlora_cli.artifacts.storage import LocalFolder, check_outside_adapters
from qlora_cli.kube.errors import ClusterError
from qlora_cli.local.trainer_process import cache_dir, environment, shell_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qlora_cli.artifacts.adapters import PublishedAdapter
    from qlora_cli.local.trainer_process import Commands

CONFIG = "config.json"
"""Without it, a folder is no model."""


@dataclass(frozen=True)
class MergeRequest:
    """Input of a merge."""

    base: str
    revision: str
    """Empty: whatever is there."""


def plan(published: PublishedAdapter, base: str | None) -> MergeRequest:
    """Return the base that the manifest names, at its revision, unless another is given.

    Raises:
        ClusterError: the manifest names no base, or one that this machine cannot reach.

    """
    named = published.body.get("base") or {}
    source = base or str(named.get("source") or "")
    if not source:
        where = published.folder.uri(adapters.MANIFEST)
        raise ClusterError(f"{where}: base.source names no model; name it with --base")
    if source.startswith("pvc://"):
        raise ClusterError(f"{source}: the base is on a claim; name a copy of it with --base")
    return MergeRequest(source, "" if base else str(named.get("revision") or ""))


def fetch(published: PublishedAdapter, tell: Callable[[str], None]) -> Path:
    """Return the adapter as a folder of this machine, verified: where it was published, or fetched into the cache.

    Raises:
        ClusterError: it is not what was published.

    """
    if isinstance(published.folder, LocalFolder):
        if problems := adapters.verify(published, tell):
            raise ClusterError(f"{published.folder.uri('manifest.json')}: {problems[0]}; the adapter must not be used")
        place = published.folder.root / published.adapter
        return place if place.is_dir() else adapters.folder_of(published, published.folder.root)
    digest = hashlib.sha256(published.data).hexdigest()
    folder = cache_dir() / "published" / digest[:16]
    adapters.download(published, folder, tell, adapter_only=True)
    return adapters.folder_of(published, folder)


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Make a folder in ``out`` whose files take their place when the block ends well; no file is left otherwise.

    Raises:
        ClusterError: there is something at ``out`` already.
        OSError: it cannot be written.

    """
    check_outside_adapters(str(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ClusterError(f"--out {out}: is there already and not empty")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as name:
        yield Path(name)
        for path in sorted(Path(name).iterdir(), key=lambda path: path.name == CONFIG):
            path.rename(out / path.name)


def run(merge: MergeRequest, adapter: Path, out: Path, commands: Commands) -> int:
    """Run the merge and return its exit code. Its output goes to that of this process."""
    arguments = [f"--base={merge.base}", f"--adapter={adapter}", f"--out={out}", f"--cache-dir={cache_dir()}"]
    arguments += [f"--revision={merge.revision}"] if merge.revision else []
    return shell_code(subprocess.run([*commands.merge, *arguments], env=environment(), check=False).returncode)
