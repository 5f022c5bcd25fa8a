from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import wandb

from qlora_trainer.errors import StorageError, UserError
from qlora_trainer.tracking.journal import FOLDER_ENVIRONMENT, StepRow
from qlora_trainer.tracking.wandb_sink import WandBSink
from testing.ports import free_port
from tracking_fixtures import facts_of, wandb_rows


@pytest.fixture(autouse=True)
def _teardown():
    """End the client's service, which keeps the settings of the first test."""
    yield
    wandb.teardown()


def rows(first, last):
    return [StepRow(step, 1e9 + step, {"train/loss": 1.0, "eval/loss": 2.0}) for step in range(first, last + 1)]


def test_offline_the_folder_of_the_newest_attempt_has_the_whole_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    history = tmp_path / "history.jsonl"
    history.write_text("{}\n")
    first = WandBSink(facts_of({"type": "WandB"}))
    first.write(rows(0, 7))
    first.close()
    second = WandBSink(facts_of({"type": "WandB"}, attempt=2))
    second.write(rows(0, 5))
    second.write(rows(6, 9))
    second.finish([], 0, "s3://adapters/tiny", history)
    second.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert second.url == str(folder)
    assert [(row["_step"], row["train/loss"], row["eval/loss"]) for row in wandb_rows(folder)] == [
        (step, 1.0, 2.0) for step in range(10)
    ]
    assert (folder / "files" / "history.jsonl").read_text() == "{}\n"


@pytest.fixture
def _online(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv(FOLDER_ENVIRONMENT, str(tmp_path))


@pytest.mark.usefixtures("_online")
def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(
        UserError, match=r"spec.tracking\[0\].credentials: must give WANDB_API_KEY for https://api.wandb.ai"
    ):
        WandBSink.check(facts_of({"type": "WandB"}))


@pytest.mark.usefixtures("_online")
def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    sink = {"type": "WandB", "server": f"http://127.0.0.1:{free_port()}"}
    with pytest.raises(StorageError, match=r"spec.tracking\[0\]: http://127.0.0.1:\d+ does not take the run"):
        WandBSink.check(facts_of(sink))


class _RefusingHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"errors": [{"message": "permission denied"}]}'
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.do_GET()

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def refusing_server():
    """Return the address of a server that answers every request with 403."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _RefusingHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.usefixtures("_online")
def test_a_server_that_refuses_is_named_before_and_during_a_run(monkeypatch, refusing_server):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    facts = facts_of({"type": "WandB", "server": refusing_server})
    with pytest.raises(UserError, match=rf"spec.tracking\[0\].credentials: are not taken by {refusing_server}"):
        WandBSink.check(facts)
    with pytest.raises(StorageError, match=rf"spec.tracking\[0\]: {refusing_server} does not take the run: .*403"):
        WandBSink(facts)
