"""Folders with a published adapter, as the trainer leaves them."""

from __future__ import annotations

import hashlib
import json

FILES = {
    "3f2a-attempt-1/adapter/adapter_config.json": b"{}",
    "3f2a-attempt-1/adapter/adapter_model.safetensors": bytes(range(256)) * 1000,
    "3f2a-attempt-1/merged/model.safetensors": b"merged" * 100,
}


def manifest(files=FILES, listed=None, **more):
    listed = (
        listed
        if listed is not None
        else [{"path": p, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for p, d in files.items()]
    )
    body = {"schema": "qlora.dev/manifest/v1", "job": "tune", "adapter": "3f2a-attempt-1/adapter", "files": listed}
    return json.dumps({**body, "base": {"source": "/models/base", "revision": "r1"}, **more}).encode()


def publish(folder, files=FILES, data=None):
    for path, content in {**files, "manifest.json": data or manifest(files)}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder
