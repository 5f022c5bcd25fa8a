"""The search for an adapter in the folders above a place."""

from __future__ import annotations

import socket

import pytest

from qlora_storage import published
from qlora_storage.errors import StorageError


def test_a_server_that_is_out_of_reach_is_waited_for_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setattr(published, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/a/b/c/manifest\.json: tried for 0 s"):
        published.enclosing_manifest("s3://bucket/a/b/c/rows.jsonl", "")
