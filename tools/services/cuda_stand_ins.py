"""Wheels that stand in for CUDA's, so that an image whose torch only computes on a CPU has 2 GB and not 6.

The package index has torch for Linux with CUDA alone, and that does not load without the libraries of the nvidia-*
packages. A stand-in has the version of the package it stands for, plus "+standin", which an installer prefers; its
libraries have the functions that torch is linked against, and all of them answer "no CUDA device".
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from tempfile import TemporaryDirectory

NO_DEVICE = 100
"""cudaErrorNoDevice; to the other libraries any number but 0 is an error."""
KEPT = {"nvidia-cuda-runtime", "nvidia-ml-py"}
"""Small; asked for devices when torch starts."""
NOT_NEEDED = {"triton", "cuda-bindings"}
"""Large; used on GPUs alone."""


@dataclass(frozen=True)
class Symbol:
    """A function or variable of a shared library."""

    name: str
    version: str
    """Empty: none."""
    kind: str
    """FUNC or OBJECT; NOTYPE where it is only used."""

    @property
    def code(self) -> str:
        return f"int {self.name}(void) {{ return {NO_DEVICE}; }}" if self.kind == "FUNC" else f"long {self.name}[64];"


def write_wheels(folder: Path) -> list[Path]:
    """Write a stand-in for each of CUDA's large packages in this environment, which must have torch."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {s.name for library in _libraries(distribution("torch")) for s in _symbols(library, defined=False)}
    with TemporaryDirectory() as work:
        return [_write_wheel(folder, package, wanted, Path(work)) for package in packages()]


def packages() -> list[Distribution]:
    """Packages of this environment that get a stand-in."""
    return [package for package in distributions() if _is_stood_in_for(package)]


def _is_stood_in_for(package: Distribution) -> bool:
    name = _normal_name(package)
    return (name.startswith("nvidia-") or name in NOT_NEEDED) and name not in KEPT


def _normal_name(package: Distribution) -> str:
    return package.name.lower().replace("_", "-")


def _libraries(package: Distribution) -> list[Path]:
    return [Path(str(f.locate())) for f in package.files or () if ".so" in f.suffixes]


def _symbols(library: Path, *, defined: bool) -> list[Symbol]:
    """The dynamic symbols that a library has, or those that it wants of others."""
    command = ["readelf", "--wide", "--dyn-syms", library]
    found = []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        columns = line.split()
        if len(columns) >= 8 and columns[3] in ("FUNC", "OBJECT", "NOTYPE") and (columns[6] != "UND") == defined:
            name, _, version = columns[7].partition("@")
            found.append(Symbol(name, version.lstrip("@"), columns[3]))
    return found


def _write_wheel(folder: Path, package: Distribution, wanted: set[str], work: Path) -> Path:
    site_packages, files = Path(str(package.locate_file(""))), {}
    for library in _libraries(package) if _normal_name(package) not in NOT_NEEDED else ():
        symbols = [s for s in _symbols(library, defined=True) if s.name in wanted]
        files[str(library.relative_to(site_packages))] = _compile(library.name, symbols, work)
    # The version changes with the content: an installer's cache knows a wheel by its name.
    content = hashlib.sha256(b"".join(files.values())).hexdigest()[:8]
    name, version = package.name.replace("-", "_"), f"{package.version}+standin.{content}"
    metadata = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {version}\n"
    files[f"{name}-{version}.dist-info/METADATA"] = metadata.encode()
    files[f"{name}-{version}.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = f"{name}-{version}.dist-info/RECORD"
    lines = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in files.items()]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(zipfile.ZipInfo(path), data)  # no time of writing: the same wheel each time
    return wheel


def _compile(name: str, symbols: list[Symbol], work: Path) -> bytes:
    source, script, library = work / "stand_in.c", work / "stand_in.map", work / name
    source.write_text("".join(f"{symbol.code}\n" for symbol in symbols))
    by_version = defaultdict(list)
    for symbol in symbols:
        by_version[symbol.version].append(f"{symbol.name};")
    nodes = [f"{version} {{ global: {' '.join(names)} }};\n" for version, names in by_version.items() if version]
    script.write_text("".join(nodes) or "{ global: *; };\n")
    options = ["-shared", "-fPIC", "-nostdlib", "-Wl,--build-id=none", f"-Wl,-soname,{name}"]
    subprocess.run(["gcc", *options, f"-Wl,--version-script={script}", "-o", library, source], check=True)
    return library.read_bytes()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
