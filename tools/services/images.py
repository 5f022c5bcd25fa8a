"""The project's images, built from the Dockerfile without a container engine and kept outside the repository.

``build("operator")`` is an :class:`Image`: a name for pods and a docker archive for ``ctr images import``. What is
built is found again by a key of all that goes into it. The base is a bare Debian made here; the trainer's torch is the
index's CUDA build, with :mod:`services.cuda_stand_ins` in place of CUDA's libraries.

``python tools/services/images.py`` builds both. Time on 2 cores, nothing cached but wheels: 4 minutes.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, get_args

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from services import cuda_stand_ins
from services.binaries import ToolMissingError, tools_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

Target = Literal["operator", "trainer"]

REPOSITORY = Path(__file__).parents[2]
SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
"""Debian mirror that is used when this machine's apt has none for the suite."""
BASE_PACKAGES = "ca-certificates"
SOURCES: dict[Target, tuple[str, ...]] = {
    "operator": ("api/qlora_api", "memory/qlora_memory", "operator/qlora_operator", "sweep/qlora_sweep"),
    "trainer": ("api/qlora_api", "memory/qlora_memory", "storage/qlora_storage", "trainer/qlora_trainer"),
}
STAND_INS = Path(cuda_stand_ins.__file__)
PROGRAMS = ("buildah", "debootstrap", "runc")
BUILD_SECONDS = 1800
UNUSED_SECONDS = 600
STORE_BYTES = 12_000_000_000
"""Both images, built twice."""


@dataclass(frozen=True)
class Image:
    """An image that is built."""

    name: str
    """Its tag changes with the content, so that pods never get another image of this name."""
    archive: Path
    """Docker archive: all layers, not compressed."""
    base: Path
    """Root file system that it is built on, as a tar."""

    @property
    def bytes_above_base(self) -> int:
        return self.archive.stat().st_size - self.base.stat().st_size


def build(target: Target) -> Image:
    """Build an image, or find it built. Other processes that want one wait.

    Raises:
        ToolMissingError: this user is not root, a program is missing, or the build fails.

    """
    _require_programs()
    base = build_base()
    with _alone(), TemporaryDirectory(dir=_folder()) as context:
        # A copy: the repository may change while this builds.
        key = _hash(base.name, *_copy_inputs(target, Path(context)))
        image = Image(f"qlora-{target}:{key}", _folder() / f"{target}-{key}.tar", base)
        if not image.archive.exists():
            started = time.monotonic()
            _pin_stand_ins(Path(context) / "constraints.txt", _wheels())
            ImageStore(base).build(target, Path(context), image)
            _remove_unused(f"{target}-*.tar")
            _say(f"built {image.name} in {time.monotonic() - started:.0f} s", image.archive)
        image.archive.touch()  # in use
        return image


def build_base() -> Path:
    """Make a bare Debian, as a tar of its root file system, or find it made.

    Raises:
        ToolMissingError: this user is not root, a program is missing, or Debian cannot be reached.

    """
    _require_programs()
    base = _folder() / f"base-{_hash(SUITE, BASE_PACKAGES)}.tar"
    with _alone():
        if not base.exists():
            started = time.monotonic()
            with TemporaryDirectory(dir=_folder()) as work:
                root, unfinished = Path(work) / "root", Path(work) / "base.tar"
                options = ("--variant=minbase", f"--include={BASE_PACKAGES}")
                _run("debootstrap", *options, SUITE, root, _mirror())
                left_out = ("./dev/*", "./var/cache/apt/*", "./var/lib/apt/lists/*", "./var/log/*.log")
                excluded = (f"--exclude={pattern}" for pattern in left_out)
                _run("tar", "--create", "--file", unfinished, "--directory", root, "--numeric-owner", *excluded, ".")
                unfinished.rename(base)
            _say(f"made a bare Debian in {time.monotonic() - started:.0f} s", base)
    return base


@contextmanager
def root_file_system(image: Image) -> Iterator[Path]:
    """Root file system of a built image, mounted."""
    with _alone():
        store = ImageStore(image.base)
        known = store.buildah("images", "--quiet", "--filter", f"reference={image.name}")
        container = store.buildah("from", image.name if known else f"docker-archive:{image.archive}")
        mount = Path(store.buildah("mount", container))
    try:
        yield mount
    finally:
        store.buildah("rm", container)


class ImageStore:
    """Storage of buildah's layers, one for each Dockerfile, begun anew when it has grown: no layer is kept for good.

    Args:
        base: tar of a root file system.

    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._folder = _folder() / f"store-{_hash(base.name, (REPOSITORY / 'Dockerfile').read_bytes())}"
        for store in _folder().glob("store-*"):
            if store != self._folder or _size(store) > STORE_BYTES:
                _remove(store)

    def build(self, target: Target, context: Path, image: Image) -> None:
        """Build and write the archive."""
        base = f"localhost/{self._base.stem}"
        if not self.buildah("images", "--quiet", "--filter", f"reference={base}"):
            self._import(base)
        common = ("bud", "--layers", "--force-rm", "--network", "host", "--build-arg", f"BASE={base}")
        # First what the images themselves run on, without the mounts below: no trace of one is in an image.
        self.buildah(*common, "--target", "python", context)
        self.buildah(*common, *_surroundings(), "--target", target, "--tag", image.name, context)
        unfinished = image.archive.with_suffix(".unfinished")
        unfinished.unlink(missing_ok=True)
        self.buildah("push", "--quiet", image.name, f"docker-archive:{unfinished}:{image.name}")
        unfinished.rename(image.archive)

    def buildah(self, *arguments: str | Path) -> str:
        places = ("--root", self._folder / "layers", "--runroot", self._folder / "run")
        return _run("buildah", *places, "--storage-driver", self._driver, *arguments)

    @cached_property
    def _driver(self) -> str:
        """Overlay, and vfs (slow, large) where this file system cannot carry an overlay."""
        with TemporaryDirectory(dir=_folder()) as work:
            places = ("--root", f"{work}/layers", "--runroot", f"{work}/run")
            command = ("buildah", *places, "--storage-driver", "overlay", "info")
            return "vfs" if subprocess.run(command, capture_output=True, check=False).returncode else "overlay"

    def _import(self, base: str) -> None:
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, self._base, "/")
        self.buildah("config", "--cmd", "/bin/sh", container)
        self.buildah("commit", "--quiet", "--rm", container, base)


def _remove(store: Path) -> None:
    """Remove a store, with the mounts that an interrupted build has left in it."""
    mounts = [Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.is_relative_to(store)), reverse=True):
        _run("umount", mount)
    shutil.rmtree(store)


def _size(folder: Path) -> int:
    return int(_run("du", "--summarize", "--block-size=1", "--one-file-system", folder).split()[0])


def _remove_unused(pattern: str) -> None:
    """Remove what nobody has asked for in a while: another checkout may be about to use it."""
    for file in _folder().glob(pattern):
        if time.time() - file.stat().st_mtime > UNUSED_SECONDS:
            file.unlink()


def _surroundings() -> list[str]:
    """Return what a build needs of this machine: package index, certificates, wheels that are there."""
    wheels = _wheels()
    cache = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    cache.mkdir(parents=True, exist_ok=True)
    index = package_index()
    authority = index.pop("SSL_CERT_FILE")
    values = {
        "PIP_INDEX_URL": pip_setting("index-url"),
        "PIP_EXTRA_INDEX_URL": pip_setting("extra-index-url"),
        **index,
        "UV_CACHE_DIR": "/run/uv",
        "UV_FIND_LINKS": "/run/wheels",
    }
    volumes = [f"{cache}:/run/uv", f"{wheels}:/run/wheels:ro"]
    if authority:
        volumes.append(f"{authority}:/run/ca.crt:ro")
        values |= {"PIP_CERT": "/run/ca.crt", "SSL_CERT_FILE": "/run/ca.crt"}
    arguments = [a for volume in volumes for a in ("--volume", volume)]
    return arguments + [a for name, value in values.items() if value for a in ("--build-arg", f"{name}={value}")]


def _wheels() -> Path:
    """Folder with the stand-ins for the packages that this environment has."""
    installed = sorted(f"{package.name} {package.version}" for package in cuda_stand_ins.packages())
    folder = _folder() / f"wheels-{_hash(STAND_INS.read_bytes(), *installed)}"
    if not folder.exists():
        for old in _folder().glob("wheels-*"):
            shutil.rmtree(old)
        unfinished = _folder() / "wheels.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        cuda_stand_ins.write_wheels(unfinished)
        unfinished.rename(folder)
    return folder


def _pin_stand_ins(constraints: Path, wheels: Path) -> None:
    """Pin the stand-ins in place of what they stand for, with their hashes: a build installs nothing without one."""
    text = constraints.read_text()
    for wheel in wheels.glob("*.whl"):
        name, version = wheel.name.split("-")[:2]
        name = name.replace("_", "-")
        pin = f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"
        text = re.sub(rf"^{name}==.*\n(?:    --hash=.*\n)+", pin, text, flags=re.MULTILINE)
    constraints.write_text(text)


def package_index() -> dict[str, str]:
    """Return this machine's package indexes and certificates as uv's variables; empty where there are none."""
    settings = {"UV_DEFAULT_INDEX": "index-url", "UV_INDEX": "extra-index-url", "SSL_CERT_FILE": "cert"}
    return {name: os.environ.get(name) or pip_setting(setting) for name, setting in settings.items()}


def pip_setting(name: str) -> str:
    """Value of one of pip's settings with pip's own precedence, as .ci/install reads it."""
    listing = _run(sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list")
    found = dict(line.partition("=")[::2] for line in listing.splitlines() if "=" in line)
    keys = (f":env:.{name}", f"install.{name}", f"global.{name}")
    return " ".join(ast.literal_eval(next((found[key] for key in keys if key in found), "''")).split())


def _copy_inputs(target: Target, context: Path) -> Iterator[bytes]:
    """Copy all that goes into an image; what its key is made of. Of pyproject.toml only the dependencies count."""
    for folder in SOURCES[target]:
        shutil.copytree(REPOSITORY / folder, context / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Dockerfile", ".dockerignore", "constraints.txt", "pyproject.toml"):
        shutil.copy2(REPOSITORY / name, context)
    pyproject = tomllib.loads((context / "pyproject.toml").read_text())
    project, groups = pyproject["project"], pyproject["dependency-groups"]
    trainer = project["dependencies"], project["optional-dependencies"]["trainer"]
    yield repr(trainer if target == "trainer" else groups["operator"]).encode()
    yield STAND_INS.read_bytes()
    for path in sorted(context.rglob("*")):
        if path.is_file() and path.name != "pyproject.toml":
            yield str(path.relative_to(context)).encode()
            yield path.read_bytes()


def _mirror() -> str:
    """Return where this machine's own packages of the suite come from."""
    targets = _run("apt-get", "indextargets", "--format", "$(CREATED_BY) $(CODENAME) $(COMPONENT) $(REPO_URI)")
    wanted = ["Packages", SUITE, "main"]
    return next((line.split()[3] for line in targets.splitlines() if line.split()[:3] == wanted), MIRROR)


def _require_programs() -> None:
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        raise ToolMissingError(f"images need {', '.join(missing)}: apt-get install {' '.join(missing)}")
    if os.geteuid():
        raise ToolMissingError("images are built by root: layers hold files of other users")


def _folder() -> Path:
    folder = tools_dir() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _alone() -> Iterator[None]:
    with (_folder() / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hash(*parts: str | bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()[:12]


def _run(*command: str | Path) -> str:
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr)[-3000:]
        raise ToolMissingError(f"{' '.join(map(str, command[:1]))} ended with {done.returncode}:\n{said}")
    return done.stdout.strip()


def _say(what: str, file: Path) -> None:
    print(f"{what}, {file.stat().st_size / 1e6:.0f} MB", file=sys.stderr)


if __name__ == "__main__":
    for each in get_args(Target):
        print(build(each).archive)
