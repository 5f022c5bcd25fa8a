"""Write a run to Weights & Biases, through its own client.

Online, the server is the memory: the run has the job's UID as its ID, is resumed by it, and says which step comes next.
Offline (``WANDB_MODE=offline``), an attempt writes the whole run anew into a folder for ``wandb sync``, in place of the
folders of earlier attempts.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.pop("WANDB_SERVICE", None)  # of a program that started us: its service keeps runs of its own

import wandb
from wandb.errors import AuthenticationError, CommError, Error, UsageError

from qlora_api.contract import ExitCode
from qlora_trainer.errors import StorageError, UserError
from qlora_trainer.tracking.journal import tracking_folder
from qlora_trainer.tracking.run_facts import newest_attempt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qlora_trainer.tracking.journal import StepRow
    from qlora_trainer.tracking.run_facts import RunFacts

DEFAULT_SERVER = "https://api.wandb.ai"
CONNECT_SECONDS = 20
FINISH_SECONDS = 50
"""Less than the launcher waits for."""
OFFLINE = "offline"


class WandBSink:
    """The run in its project."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        with translated(facts):
            self._run = wandb.init(
                project=facts.sink.effective_project,
                entity=facts.sink.entity,
                id=facts.job.uid,
                name=facts.job.name,
                resume="allow",
                config={**facts.parameters},
                dir=None if is_offline() else tracking_folder(),
                settings=settings_of(facts),
            )
            self._next = self._run.step
        if self._run.offline:
            self._remove_earlier_folders()
        self.url = self._run.url if not self._run.offline else str(Path(self._run.dir).parent)

    @staticmethod
    def check(facts: RunFacts) -> None:
        """Check that the server takes the API key. Offline there is nothing to check.

        Raises:
            UserError: it does not, or there is none.
            StorageError: the server does not answer.

        """
        if is_offline():
            return
        with translated(facts):
            wandb.Api(overrides={"base_url": server_of(facts)}, timeout=CONNECT_SECONDS)

    def write(self, rows: Sequence[StepRow]) -> None:
        with translated(self._facts):
            for row in rows:
                if row.step >= self._next:
                    self._run.log(dict(row.metrics), step=row.step)

    def finish(self, attempts: Sequence[Mapping[str, Any]], exit_code: int, adapter: str, history: Path) -> None:
        with translated(self._facts):
            self._run.summary["attempt"] = self._facts.attempt
            self._run.summary.update(newest_attempt(attempts))
            if exit_code == ExitCode.DONE:
                self._run.summary["adapter"] = adapter
                kept = shutil.copy(history, self._run.dir)
                self._run.save(kept, base_path=self._run.dir, policy="end")
            elif exit_code == ExitCode.PREEMPTED and not self._run.offline:
                self._run.mark_preempting()
            self._run.finish(exit_code=exit_code)

    def close(self) -> None:
        """End the client's process, and before it a run that is given up; :meth:`finish` has ended any other."""
        self._run.finish(exit_code=1)
        wandb.teardown()

    def _remove_earlier_folders(self) -> None:
        own = Path(self._run.dir).parent
        for folder in own.parent.glob(f"{OFFLINE}-run-*-{self._facts.job.uid}-attempt-*"):
            if folder != own:
                shutil.rmtree(folder)


def is_offline() -> bool:
    return bool(wandb.setup().settings.mode in (OFFLINE, "dryrun"))


def server_of(facts: RunFacts) -> str:
    return facts.sink.server or DEFAULT_SERVER


def settings_of(facts: RunFacts) -> wandb.Settings:
    """Return settings that send nothing but what this module says."""
    return wandb.Settings(
        base_url=server_of(facts),
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        x_disable_machine_info=True,
        x_sync_dir_suffix=f"attempt-{facts.attempt}",
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=CONNECT_SECONDS,
        login_timeout=CONNECT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )


@contextmanager
def translated(facts: RunFacts) -> Iterator[None]:
    """Raise errors of the client as errors of a job.

    Raises:
        UserError: there is no API key, or the server refuses.
        StorageError: the server does not answer, or cannot do it now.

    """
    try:
        yield
    except Error as error:
        text, server = " ".join(str(error).split()), server_of(facts)
        if isinstance(error, UsageError):
            raise UserError(
                f"{facts.field}.credentials", facts.sink.credentials, f"must give WANDB_API_KEY for {server}: {text}"
            ) from error
        response = getattr(error.__cause__ or error.__context__, "response", None)
        if isinstance(error, AuthenticationError) and response is not None and 400 <= response.http_status < 500:
            raise UserError(
                f"{facts.field}.credentials", facts.sink.credentials, f"are not taken by {server}: {text}"
            ) from error
        if isinstance(error, CommError):
            raise StorageError(f"{facts.field}: {server} does not take the run: {text}") from error
        raise
