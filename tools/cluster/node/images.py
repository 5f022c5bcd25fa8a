"""Container images made of busybox, as docker archives that a node can import. No registry is asked."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BUSYBOX = Path("/bin/busybox")
"""Debian's busybox-static."""
PAUSE_IMAGE = "qlora.dev/test/pause:1"
BUSYBOX_IMAGE = "qlora.dev/test/busybox:1"
"""For tests: a shell, wget, nc, httpd, nslookup and the rest of busybox."""
EXECUTABLE = 0o755


def write_busybox_archive(path: Path) -> Path:
    """Write one docker archive with both images: what keeps a sandbox, and a shell."""
    layer = _busybox_layer()
    configs = {
        PAUSE_IMAGE: _config(layer, ["/bin/busybox", "sleep", "2147483647"]),
        BUSYBOX_IMAGE: _config(layer, ["/bin/sh"]),
    }
    manifest = [
        {"Config": f"{_digest(config)}.json", "RepoTags": [name], "Layers": ["layer.tar"]}
        for name, config in configs.items()
    ]
    files = {f"{_digest(config)}.json": config for config in configs.values()}
    path.write_bytes(_tar({**files, "layer.tar": layer, "manifest.json": json.dumps(manifest).encode()}))
    return path


def _busybox_layer() -> bytes:
    listed = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True)
    links = {f"bin/{name}": "/bin/busybox" for name in listed.stdout.split() if name != "busybox"}
    folders = ("bin", "tmp", "etc", "root", "dev", "proc", "sys")
    return _tar({"bin/busybox": BUSYBOX.read_bytes()}, links=links, folders=folders)


def _config(layer: bytes, command: Sequence[str]) -> bytes:
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": list(command), "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{_digest(layer)}"]},
    }
    return json.dumps(config).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tar(files: dict[str, bytes], links: dict[str, str] | None = None, folders: Sequence[str] = ()) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in folders:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else EXECUTABLE
            tar.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), EXECUTABLE
            tar.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return out.getvalue()
