"""Start lm-evaluation-harness as a process without credentials, and wait for what it finds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from typing import TYPE_CHECKING

from qlora_trainer.errors import TrainerError, UserError
from qlora_trainer.python_process import environment_without_credentials, python_command
from qlora_trainer.tasks.harness_request import (
    ANSWERS_FILE,
    DOCUMENTS,
    ORDER_FILE,
    RESULT_FILE,
    Answer,
    HarnessResult,
    Order,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

FIELD = "spec.evaluate.tasks"
POLL_SECONDS = 1.0
LOG_FILE = "harness.log"
NETWORK_VARIABLES = (
    *("HF_ENDPOINT", "HF_HUB_OFFLINE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
    *(name for upper in ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY") for name in (upper, upper.lower())),
)
"""Environment variables for reaching the Hub, which has the datasets of public tasks; no token."""
PROGRAM = "qlora_trainer.tasks.harness"


def check_installed() -> None:
    """Find out that lm-evaluation-harness is there.

    Raises:
        UserError: this image or environment is without it.

    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "spec.evaluate",
            None,
            "needs lm-evaluation-harness, which is not installed here: use an image with it, or install the extra "
            "'evaluate' of qlora-operator",
        )


def run_harness(
    folder: Path, order: Order, answers: Sequence[Answer] | None = None, beat: Callable[[], object] = lambda: None
) -> HarnessResult:
    """Have the tasks asked, or, with the answers, scored.

    Args:
        folder: of this run alone; without answers the tasks' rows are left in it, with answers they are in it.
        order: the tasks.
        answers: one for each request of the run without answers.
        beat: called once a second, as a sign of life.

    Raises:
        UserError: names the task that cannot be asked.
        TrainerError: the process failed.

    """
    (folder / ORDER_FILE).write_text(order.model_dump_json())
    if answers is not None:
        (folder / ANSWERS_FILE).write_text(json.dumps(answers))
    (folder / DOCUMENTS).mkdir(exist_ok=True)
    environment = environment_without_credentials() | {"HF_HOME": str(folder / "hub"), "TQDM_DISABLE": "1"}
    if answers is None:
        environment |= {name: os.environ[name] for name in NETWORK_VARIABLES if name in os.environ}
    else:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [*python_command(), "-m", PROGRAM, str(folder)]
    with (folder / LOG_FILE).open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while True:
                beat()
                try:
                    code = process.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
            process.wait()
    if code:
        tail = " ".join((folder / LOG_FILE).read_text(errors="replace").split())[-300:]
        raise TrainerError(f"lm-evaluation-harness ended with code {code}: {tail}")
    outcome = HarnessResult.model_validate_json((folder / RESULT_FILE).read_bytes())
    if outcome.problem:
        raise UserError(FIELD, outcome.task, outcome.problem)
    return outcome
