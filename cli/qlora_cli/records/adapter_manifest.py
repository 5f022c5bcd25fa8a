"""The manifest of a published adapter."""

from __future__ import annotations

from qlora_cli.records.recorded import Group, Integer, Recorded, Size


class _Base(Recorded):
    source: str = ""
    revision: str | None = None


class _File(Recorded):
    path: str
    size: Size
    sha256: str


class _Metrics(Recorded):
    step: Integer | None = None
    tokens: Integer | None = None


class _Model(Recorded):
    source: str | None = None


class _Config(Recorded):
    model: _Model = _Model()
    dataset: Group = {}


class RecordedManifest(Recorded):
    """``manifest.json`` as far as commands read it."""

    adapter: str
    base: _Base = _Base()
    files: list[_File]
    metrics: _Metrics = _Metrics()
    packages: dict[str, str] = {}
    config: _Config = _Config()
