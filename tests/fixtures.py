"""Fixtures over the real servers. ``tests/conftest.py`` imports them for every test."""

from __future__ import annotations

import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

import pytest

from services.binaries import ToolMissingError
from services.versitygw import VersityGateway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_bucket_numbers = count()


def skip_unless_ci(reason: str) -> None:
    """Skip a test whose tools are not there; with CI=true that is a failure."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def check_golden(path: Path, text: str) -> None:
    """Compare a text with a golden file; ``REFRESH_GOLDEN=1`` writes the file first, which CI refuses."""
    if os.environ.get("REFRESH_GOLDEN") == "1":
        assert os.environ.get("CI", "").lower() != "true", "golden files are looked at by a person"
        path.write_text(text)
    assert text == path.read_text()


def winners_at_once(count: int, attempt: Callable[[int], object], lost: type[Exception]) -> list[int]:
    """Attempt something in threads that begin together; return the numbers of those in which nothing was raised.

    Args:
        count: of the threads.
        attempt: called with the number of each.
        lost: what it raises where another was faster.

    """
    together = threading.Barrier(count)

    def wins(number: int) -> bool:
        together.wait()
        try:
            attempt(number)
        except lost:
            return False
        return True

    with ThreadPoolExecutor(count) as pool:
        return [number for number, won in enumerate(pool.map(wins, range(count))) if won]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VersityGateway]:
    """One S3 server for the session. A test that stops it must start its own."""
    try:
        server = VersityGateway(tmp_path_factory.mktemp("s3"))
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    with server:
        yield server


def use_s3(server: VersityGateway, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point the environment at a server; the URI of a bucket of this test's own."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.bucket(f"bucket-{next(_bucket_numbers)}")


@pytest.fixture
def s3(s3_server: VersityGateway, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of an empty bucket, with the credentials in the environment."""
    return use_s3(s3_server, monkeypatch)


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    """URI of an empty place: each test with it runs on a folder and on a real S3 server."""
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3") + "/a prefix"


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts file systems of a given size and mode below the test's folder, for real "disk full" and "read-only"."""
    if os.geteuid() != 0:
        skip_unless_ci("mounting a tmpfs needs root")

    @contextmanager
    def mounted(options):
        folder = tmp_path / "mounted"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)

    return mounted
