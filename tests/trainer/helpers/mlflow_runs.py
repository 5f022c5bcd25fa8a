"""Read what an MLflow server has of a job's run."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mlflow.tracking import MlflowClient

if TYPE_CHECKING:
    from mlflow.entities import Run


def only_run(url: str, experiment: str = "qlora") -> tuple[MlflowClient, Run]:
    """Return a client of the server and the one run of an experiment."""
    client = MlflowClient(url)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return client, run


def metric_steps(url: str, name: str) -> list[tuple[int, float]]:
    """Return step and value of all that the server has of a metric of the one run, sorted."""
    client, run = only_run(url)
    return sorted((each.step, each.value) for each in client.get_metric_history(run.info.run_id, name))
