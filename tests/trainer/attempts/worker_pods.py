"""Workers (pods) of one attempt, as launchers on this machine that know each other by index and port alone."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from qlora_api.contract import TerminationMessage, TrainerConfig
from testing.forks import ForkedProgram, start_program
from testing.timeouts import PATIENCE_SECONDS


@dataclass
class WorkerPod:
    """One worker's launcher, with files of its own."""

    config: TrainerConfig
    index: int
    folder: Path
    process: ForkedProgram | None = None

    @property
    def log(self) -> str:
        return self._path("log").read_text()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}-{self.config.attempt}-worker-{self.index}"

    def start(self) -> WorkerPod:
        own = self.config.model_copy(update={"termination_message_path": str(self._path("termination"))})
        self._path("config").write_text(own.model_dump_json(by_alias=True))
        self._path("log").touch()
        own_environment = {"JOB_COMPLETION_INDEX": str(self.index), "NODE_NAME": f"node-{self.index}"}
        words = ["-m", "qlora_trainer", str(self._path("config"))]
        self.process = start_program(words, self._path("log"), {**os.environ, **own_environment})
        return self

    def rank(self, number: int) -> psutil.Process:
        """Return a rank of this worker, which starts them in their order."""
        children = psutil.Process(self.process.pid).children()
        children.sort(key=lambda process: (process.create_time(), process.pid))
        return children[number - self.index * self.config.ranks_per_worker]

    def until(self, text: str, seconds: float = PATIENCE_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log:
            assert time.monotonic() < deadline, self.log[-3000:]
            assert self.process.poll() is None, self.log[-3000:]
            time.sleep(0.05)

    def end(self) -> tuple[int, TerminationMessage | None]:
        code = self.process.wait(timeout=PATIENCE_SECONDS)
        path = self._path("termination")
        has_word = path.exists() and path.stat().st_size > 0
        return code, TerminationMessage.model_validate_json(path.read_bytes()) if has_word else None


def losses(log: str) -> list[str]:
    return [line.split(" loss ")[1].split()[0] for line in log.splitlines() if " INFO step " in line and " lr " in line]
