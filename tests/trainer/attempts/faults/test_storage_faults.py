"""A whole run over object storage that fails in every way: the adapter of a fault-free run, or an error with its field.

Prepare, training, a killed rank, resuming, publishing and downloading, through a proxy that answers badly. Here a run
meets a different fault at each of its calls; ``make soak-storage`` (SOAK_STORAGE=1) has a run for each fault, which
meets it at every call.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from fixtures import use_s3
from qlora_api.contract import ExitCode
from qlora_cli import app
from qlora_storage.object_store import open_store
from services.faulty_s3 import FINAL, TRANSIENT, Call, FaultyS3, S3Fault, faulty_s3, once_each

if TYPE_CHECKING:
    from collections.abc import Callable

SOAK = os.environ.get("SOAK_STORAGE") == "1"
CHANGES = {"training": {"epochs": None, "maxSteps": 4}, "checkpoint": {"everySteps": 2}}
DENIED = next(fault for fault in FINAL if fault.name == "denied")


def in_turn(call: Call, times: int) -> S3Fault | None:
    """Give each call one of the faults when it comes for the first time."""
    return TRANSIENT[zlib.crc32(repr(call).encode()) % len(TRANSIENT)] if times == 0 else None


@dataclass
class BucketRun:
    """A run whose model, rows, cache, checkpoints and adapter are in a bucket."""

    runner: object
    bucket: str
    download: Path

    def config(self, attempt: int = 1):
        config = self.runner.config(
            ranks=1,
            attempt=attempt,
            model={"source": f"{self.bucket}/model"},
            dataset={"train": {"source": f"{self.bucket}/rows/train.jsonl"}},
            output={"destination": f"{self.bucket}/out"},
            **CHANGES,
        )
        places = {"checkpoint_uri": f"{self.bucket}/checkpoints", "shared_cache_uri": f"{self.bucket}/cache"}
        return config.model_copy(update=places)

    def train(self):
        """Return how it ended: of the first step that did not end well, or of the last."""
        if code := self.runner.prepare(self.config()):
            return self.runner.ended(self.config(), code)
        killed = self.runner.kill_at(self.config(), 3)
        assert killed.message is None, killed.text
        return self.runner.run(self.config(attempt=2))

    def adapter_hash(self) -> str:
        """Download the adapter with the command line, which verifies it; return the hash of its weights."""
        result = CliRunner().invoke(
            app.app, ["download", f"{self.bucket}/out/manifest.json", "--to", str(self.download)]
        )
        assert result.exit_code == 0, result.output
        manifest = json.loads((self.download / "manifest.json").read_text())
        [found] = [f["sha256"] for f in manifest["files"] if f["path"].endswith("adapter/adapter_model.safetensors")]
        return found


@pytest.fixture
def proxy(s3_server):
    with faulty_s3(s3_server) as running:
        yield running


@pytest.fixture
def make_run(proxy, monkeypatch, runner, tmp_path):
    """Put model and rows into a bucket of its own, without faults."""

    def make(name: str) -> BucketRun:
        bucket = use_s3(proxy, monkeypatch)
        proxy.choose = lambda _call, _times: None
        store = open_store(bucket, "test")
        for path in runner.model.iterdir():
            store.put(f"model/{path.name}", path)
        store.put("rows/train.jsonl", runner.rows)
        folder = tmp_path / name
        folder.mkdir()
        changed = type(runner)(runner.model, runner.rows, folder / "cache", folder)
        return BucketRun(changed, bucket, folder / "download")

    return make


def run_through(proxy: FaultyS3, run: BucketRun, choose) -> str:
    proxy.choose = choose
    ended = run.train()
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    return run.adapter_hash()


@pytest.mark.ranks
@pytest.mark.parametrize("fault", TRANSIENT if SOAK else [None], ids=lambda fault: fault.name if fault else "in-turn")
def test_a_run_that_meets_faults_ends_with_the_adapter_of_a_fault_free_run(proxy, make_run, fault):
    expected = run_through(proxy, make_run("calm"), lambda _call, _times: None)
    proxy.calls.clear()
    assert run_through(proxy, make_run("faulty"), once_each(fault) if fault else in_turn) == expected
    assert sum(proxy.faults.values()) > 20
    assert set(proxy.faults) == ({fault.name} if fault else {each.name for each in TRANSIENT})


PLACES = ("model", "rows", "checkpoints", "out")


@pytest.mark.ranks
@pytest.mark.parametrize("fault", FINAL if SOAK else [DENIED], ids=lambda fault: fault.name)
@pytest.mark.parametrize("folder", PLACES if SOAK else ["model", "checkpoints"])
def test_what_only_the_user_can_change_ends_the_run_with_its_field_and_nothing_half_visible(
    proxy, make_run, fault, folder
):
    run = make_run(f"{fault.name}-{folder}")
    prefix = f"/{run.bucket.removeprefix('s3://')}/{folder}/"
    refused = ("GET", "PUT", "POST") if folder != "out" else ("PUT", "POST")
    proxy.choose = lambda call, _times: fault if call[1].startswith(prefix) and call[0] in refused else None
    if run.runner.prepare(run.config()) == 0:
        ended = run.runner.train(run.config())
    else:
        ended = run.runner.ended(run.config(), ExitCode.USER_ERROR)
    assert ended.message.exit_code == ExitCode.USER_ERROR, ended.log[-3000:]
    assert ended.text.startswith("spec."), ended.text
    proxy.choose = lambda _call, _times: None
    there = [key for key, _ in open_store(f"{run.bucket}/out", "test").list() if not key.startswith(".claims")]
    assert "manifest.json" not in there


def is_write_to(part: str) -> Callable[[Call], bool]:
    return lambda call: call[0] in ("PUT", "POST") and part in call[1]


LATE = {
    "first-file-of-the-adapter": is_write_to("/adapter/"),
    "manifest": is_write_to("/out/manifest.json"),
    "last-checkpoint": lambda call: (
        is_write_to("/checkpoints/")(call) and "4" in call[1].rpartition("/checkpoints/")[2]
    ),
}
"""Moments of a run that has begun well, as when a key is revoked or expires."""


@pytest.mark.ranks
@pytest.mark.parametrize("fault", FINAL if SOAK else [DENIED], ids=lambda fault: fault.name)
@pytest.mark.parametrize("moment", LATE if SOAK else ["manifest"])
def test_what_comes_to_need_the_user_later_publishes_nothing_and_the_next_attempt_does(proxy, make_run, fault, moment):
    run = make_run(f"{fault.name}-{moment}")
    met = []

    def choose(call: Call, _times: int) -> S3Fault | None:
        if LATE[moment](call):
            met.append(call)
        return fault if met else None

    proxy.choose = choose
    assert run.runner.prepare(run.config()) == 0
    ended = run.runner.train(run.config())
    assert met
    assert ended.message.exit_code == ExitCode.USER_ERROR, ended.log[-3000:]
    assert ended.text.startswith("spec.output."), ended.text
    proxy.choose = lambda _call, _times: None
    assert "manifest.json" not in dict(open_store(f"{run.bucket}/out", "test").list())
    again = run.runner.run(run.config(attempt=2))
    assert again.code == ExitCode.DONE, again.log[-3000:]
    assert run.adapter_hash()
