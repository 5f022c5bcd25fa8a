"""Tell which stage Prepare is in: in its log, and as ``GET /progress`` where an operator asks its pod.

The process that began Prepare serves, for the one that works may spend minutes within a tokenizer; a small file tells
it the stage.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora_api.contract import ProgressReport, TrainerConfig
from qlora_api.status import Memory
from qlora_trainer.reporting.http_server import start_server

ENVIRONMENT = "QLORA_PREPARE_STAGE"
"""Names the file; the process that serves sets it."""
FIRST = "looking for results of earlier jobs"
log = logging.getLogger(__name__)


def begin_stage(name: str) -> None:
    """Log a stage that begins, and leave it for the process that serves."""
    log.info("stage: %s", name)
    if path := os.environ.get(ENVIRONMENT):
        _write(Path(path), name)


@contextmanager
def served_progress(config: TrainerConfig) -> Iterator[None]:
    """Serve the stage at the port of the configuration, meanwhile; without a port nobody asks."""
    if not config.metrics_port:
        yield
        return
    with TemporaryDirectory(prefix="qlora-prepare-") as folder:
        file = Path(folder) / "stage"
        _write(file, FIRST)
        try:
            server = start_server(
                lambda *request: _answer(config, file, *request), config.metrics_host, config.metrics_port
            )
        except OSError as error:
            log.warning("progress is not served at port %d: %s", config.metrics_port, error.strerror)
            yield
            return
        os.environ[ENVIRONMENT] = str(file)
        try:
            yield
        finally:
            del os.environ[ENVIRONMENT]
            server.shutdown()
            server.server_close()


def _write(file: Path, name: str) -> None:
    """Put a stage and when it began, by the clock that the processes of one machine share, in the file's place."""
    new = file.with_suffix(".new")
    with suppress(OSError):  # a disk that is full is another's to tell
        new.write_text(f"{time.monotonic()} {name}")
        new.replace(file)


def _answer(config: TrainerConfig, file: Path, environ: dict[str, Any], start_response: Any) -> list[bytes]:
    if environ["PATH_INFO"] != "/progress":
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there is /progress\n"]
    began, _, name = file.read_text().partition(" ")
    report = ProgressReport(
        job=config.job.name,
        attempt=0,
        section="Prepare",
        stage=name,
        stage_seconds=round(time.monotonic() - float(began), 1),
        memory=Memory(),
    )
    start_response("200 OK", [("Content-Type", "application/json")])
    return [report.model_dump_json(by_alias=True, exclude_none=True).encode()]
