"""Write a run to an MLflow tracking server, through MLflow's own client.

The server is the memory: the run is found by a tag with the job's UID, and what it has of each metric is asked for when
the sink connects. A step that an earlier attempt sent is not sent again.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qlora_api.contract import ExitCode
from qlora_trainer.errors import StorageError, UserError
from qlora_trainer.tracking.journal import METRICS
from qlora_trainer.tracking.run_facts import newest_attempt

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # before a request is repeated, the server is asked
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_ALLOW_HTTP_REDIRECTS", "false")  # a job names the server, and not where that points
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from qlora_trainer.tracking.journal import StepRow
    from qlora_trainer.tracking.run_facts import RunFacts

UID_TAG = "qlora.uid"
ADAPTER_TAG = "qlora.adapter"
ROWS_OF_A_REQUEST = 100
"""MLflow takes 1,000 metrics at once, and a row has 10 at most."""
PARAMETERS_OF_A_REQUEST = 100
LONGEST_VALUE = 6000
"""Characters of a parameter's value."""
LATER = {408, 409, 425, 429, 499}
"""Statuses below 500 after which the same request may succeed."""
log = logging.getLogger(__name__)


class MLflowSink:
    """The run in its experiment."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._client = MlflowClient(facts.sink.server)
        with translated(facts):
            experiment = find_or_create_experiment(self._client, facts)
            self._run = self._find_or_create_run(experiment)
            self._last = {name: self._newest_step(name) for name in METRICS.values()}
        self.url = f"{(facts.sink.server or '').rstrip('/')}/#/experiments/{experiment}/runs/{self._run}"

    @staticmethod
    def check(facts: RunFacts) -> None:
        """Check that the server takes runs, and create the experiment if it does not exist.

        Raises:
            UserError: it refuses, or is no MLflow server.
            StorageError: it does not answer.

        """
        with translated(facts):
            find_or_create_experiment(MlflowClient(facts.sink.server), facts)

    def write(self, rows: Sequence[StepRow]) -> None:
        for start in range(0, len(rows), ROWS_OF_A_REQUEST):
            metrics = [
                Metric(name, value, round(row.time * 1000), row.step)
                for row in rows[start : start + ROWS_OF_A_REQUEST]
                for name, value in row.metrics.items()
                if row.step > self._last[name]
            ]
            if metrics:
                with translated(self._facts):
                    self._client.log_batch(self._run, metrics=metrics)

    def finish(self, attempts: Sequence[Mapping[str, Any]], exit_code: int, adapter: str, history: Path) -> None:
        tags = {f"qlora.{name}": str(value) for name, value in newest_attempt(attempts).items()}
        tags |= {"qlora.attempt": str(self._facts.attempt)} | ({ADAPTER_TAG: adapter} if adapter else {})
        with translated(self._facts):
            self._client.log_batch(self._run, tags=[RunTag(name, value) for name, value in tags.items()])
            if exit_code == ExitCode.DONE:
                self._store(history)
            self._client.set_terminated(self._run, status_of(exit_code))

    def close(self) -> None:
        """Do nothing: every request has a connection of its own."""

    def _find_or_create_run(self, experiment: str) -> str:
        job, tag = self._facts.job, f"tags.`{UID_TAG}` = '{self._facts.job.uid}'"
        found = self._client.search_runs([experiment], tag, max_results=1)
        run = (
            found[0]
            if found
            else self._client.create_run(
                experiment,
                run_name=job.name,
                tags={UID_TAG: job.uid, "qlora.namespace": job.namespace, "mlflow.source.name": "qlora-operator"},
            )
        )
        there = run.data.params
        missing = [Param(k, v[:LONGEST_VALUE]) for k, v in self._facts.parameters.items() if k not in there]
        for start in range(0, len(missing), PARAMETERS_OF_A_REQUEST):
            self._client.log_batch(run.info.run_id, params=missing[start : start + PARAMETERS_OF_A_REQUEST])
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        return str(run.info.run_id)

    def _newest_step(self, name: str) -> int:
        """Return the last step of a metric that the server has; -1 where it has none."""
        return max((metric.step for metric in self._client.get_metric_history(self._run, name)), default=-1)

    def _store(self, history: Path) -> None:
        """Store the history as an artifact. The server chooses where, which may be out of reach from here."""
        try:
            self._client.log_artifact(self._run, str(history))
        except Exception as error:  # noqa: BLE001 of any library of any storage
            log.warning("%s: MLflow did not take the history as an artifact: %s", self._facts.field, error)


def find_or_create_experiment(client: MlflowClient, facts: RunFacts) -> str:
    """Return the ID of the sink's experiment.

    Raises:
        UserError: it was deleted.

    """
    name = facts.sink.effective_project
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another job was faster
    if found.lifecycle_stage != "active":
        raise UserError(
            f"{facts.field}.project", name, "is an experiment that was deleted: restore it, or name another one"
        )
    return str(found.experiment_id)


def status_of(exit_code: int) -> str:
    """Return MLflow's status for the end of an attempt."""
    if exit_code == ExitCode.DONE:
        return "FINISHED"
    return "KILLED" if exit_code == ExitCode.PREEMPTED else "FAILED"


@contextmanager
def translated(facts: RunFacts) -> Iterator[None]:
    """Raise MLflow's errors as errors of a job.

    Raises:
        UserError: the server refuses.
        StorageError: it does not answer, or cannot do it now.

    """
    try:
        yield
    except MlflowException as error:
        text = " ".join(str(error).split())
        server = facts.sink.server
        match error.get_http_status_code():
            case 401 | 403:
                given = facts.sink.credentials
                allowed = f"are not taken by {server}, or may not write there: {text}"
                raise UserError(f"{facts.field}.credentials", given, allowed) from error
            case status if status < 500 and status not in LATER:
                raise UserError(f"{facts.field}.server", server, f"refuses the run: {text}") from error
        raise StorageError(f"{facts.field}.server: {server} does not take the run: {text}") from error
