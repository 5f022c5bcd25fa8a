"""A real Prepare tells its stages while it works."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import suppress
from urllib.request import urlopen

from testing.timeouts import PATIENCE_SECONDS


def test_stages_of_prepare_are_told_while_it_works(runner):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path, log = runner.write(runner.config().model_copy(update={"metrics_port": port}))
    stages = []
    with log.open("ab") as out:
        prepare = subprocess.Popen([sys.executable, "-m", "qlora_trainer.prepare", str(path)], stdout=out, stderr=out)
        while prepare.poll() is None:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/progress", timeout=PATIENCE_SECONDS) as answer:
                stages.append(json.load(answer)["stage"])
            time.sleep(0.02)
    assert prepare.returncode == 0, log.read_text()[-3000:]
    assert "importing PyTorch and Transformers" in stages
    assert len(set(stages)) > 2, stages
