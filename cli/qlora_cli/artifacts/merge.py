"""``qlora merge``: an adapter merged into its base, by a process of the trainer's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.artifacts import adapters
from qlora_cli.artifacts.storage import LocalFolder
from qlora_cli.kube.errors import ClusterError
from qlora_cli.local.trainer_process import cache_dir, environment, shell_code

if TYPE_CHECKING:
    from collections.abc import Callable

    from qlora_cli.artifacts.adapters import PublishedAdapter

_PROGRAM = """\
import sys
from pathlib import Path
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.errors import TrainerError
from qlora_trainer.storage.fetch import fetch_model
from qlora_trainer.publish.gate import verify_merged
from qlora_trainer.publish.merge_adapter import merge
from qlora_trainer.reporting.rank_exit import quiet_libraries

source, revision, adapter, out, cache = sys.argv[1:]
quiet_libraries()
try:
    base = fetch_model(source, Path(cache), revision or None).path
    merge(base, Path(adapter), Path(out))
    load_tokenizer(Path(adapter)).save_pretrained(out)
    verify_merged(Path(out))
except TrainerError as error:
    sys.stderr.write(f"{error}\\n")
    sys.exit(error.exit_code)
"""


@dataclass(frozen=True)
class MergeRequest:
    """Input of a merge."""

    base: str
    revision: str
    """Empty: whatever is there."""
    out: Path


def plan(published: PublishedAdapter, base: str | None, out: Path) -> MergeRequest:
    """The base that the manifest names, at its revision, unless another is given.

    Raises:
        ClusterError: there is something at ``out`` already, or the base is where this machine cannot reach.

    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ClusterError(f"--out {out}: is there already and not empty")
    named = published.body.get("base") or {}
    source = base or str(named.get("source", ""))
    if source.startswith("pvc://"):
        raise ClusterError(f"{source}: the base is on a claim; name a copy of it with --base")
    return MergeRequest(source, "" if base else str(named.get("revision", "")), out)


def fetch(published: PublishedAdapter, tell: Callable[[str], None]) -> Path:
    """The adapter as a folder of this machine, verified: where it was published, or fetched into the cache.

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


def run(merge: MergeRequest, adapter: Path) -> int:
    """Merge; the process's exit code. Its words go where ours go."""
    arguments = [merge.base, merge.revision, str(adapter), str(merge.out), str(cache_dir())]
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    return shell_code(subprocess.run(command, env=environment(), check=False).returncode)
