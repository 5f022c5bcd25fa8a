"""Read a sweep and its trials from a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from qlora_api.job import QLoRAJob
from qlora_api.sweep.sweep import QLoRASweep
from qlora_cli.kube.errors import ClusterError
from qlora_cli.kube.names import SWEEP_LABEL, jobs_path
from qlora_sweep.trial_jobs import trial_number, trial_of_job, values_by_step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qlora_api.sweep.trials import Trial
    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster


@dataclass(frozen=True)
class SweepTrials:
    """A sweep, and the trials that it has, by number."""

    sweep: QLoRASweep
    trials: tuple[Trial, ...]
    values: tuple[Mapping[int, float], ...]
    """Objective of each trial, at each step at which an attempt ended."""


def read_trials(cluster: Cluster, body: Object) -> SweepTrials:
    """Return what a sweep's jobs say of its trials.

    Raises:
        ClusterError: the jobs may not be listed, or are of a version that this command line does not understand.

    """
    name = body["metadata"]["name"]
    jobs, _ = cluster.api.list(jobs_path(cluster.namespace), labelSelector=f"{SWEEP_LABEL}={name}")
    return trials_of(body, jobs)


def trials_of(body: Object, jobs: Iterable[Object]) -> SweepTrials:
    """Return what the jobs that a sweep controls say of its trials.

    Raises:
        ClusterError: they are of a version that this command line does not understand.

    """
    meta = body["metadata"]
    try:
        sweep, _ = QLoRASweep.read(body)
        found = [_trial(sweep, job) for job in jobs if is_controlled_by(job, meta.get("uid", ""))]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ClusterError(
            f'sweep "{meta["name"]}" is of a version that this command line does not understand ({place}: '
            f"{first['msg']}); upgrade the command line"
        ) from None
    known = sorted((each for each in found if each), key=lambda each: each[0].number)
    return SweepTrials(sweep, tuple(trial for trial, _ in known), tuple(values for _, values in known))


def is_controlled_by(job: Object, uid: str) -> bool:
    """Return whether a job's controller has this UID; labels alone make no trial."""
    owners = job["metadata"].get("ownerReferences") or ()
    return any(owner.get("controller") and owner.get("uid") == uid for owner in owners)


def _trial(sweep: QLoRASweep, body: Object) -> tuple[Trial, Mapping[int, float]] | None:
    job, _ = QLoRAJob.read(body)
    number = trial_number(sweep.metadata.name, job.metadata.name)
    if number is None:
        return None
    trial = trial_of_job(number, job, sweep.spec, job.status.gpu_seconds if job.status else 0)
    return trial, values_by_step(job, sweep.spec.objective.metric)
