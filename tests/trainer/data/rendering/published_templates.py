"""Chat templates that others publish in packages: fetched from the package index and kept in the cache."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

PACKAGES = {"llama-cpp-python": "0.3.36", "trl": "1.16.0"}
CACHE = Path.home() / ".cache" / "qlora-operator" / "chat-templates"


def published_templates() -> dict[str, str]:
    """Return the templates by package and name; skips the test where the packages cannot be had."""
    return {
        f"{package}/{path.stem}": path.read_text("utf-8")
        for package, version in PACKAGES.items()
        for path in sorted(_folder(package, version).glob("*.jinja"))
    }


def _folder(package: str, version: str) -> Path:
    folder = CACHE / f"{package}-{version}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _fetch(package, version, folder)
    return folder


def _fetch(package: str, version: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place]
        done = subprocess.run(
            [*command, "--no-binary", "llama-cpp-python", f"{package}=={version}"], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"the chat templates of {package} {version} cannot be had from the package index")
        unfinished = Path(place) / "templates"
        unfinished.mkdir()
        for name, text in _templates(next(path for path in Path(place).iterdir() if path.is_file())):
            (unfinished / name).write_bytes(text)
        unfinished.rename(folder)


def _templates(archive: Path) -> list[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return [(Path(name).name, wheel.read(name)) for name in wheel.namelist() if name.endswith(".jinja")]
    with tarfile.open(archive) as sdist:
        members = [member for member in sdist if member.name.endswith(".jinja") and member.isfile()]
        files = [(Path(member.name).name, sdist.extractfile(member)) for member in members]
        return [(name, file.read()) for name, file in files if file is not None]
