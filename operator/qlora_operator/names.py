"""Names, labels and ports of what the operator makes. Deterministic, so that a second create finds the first."""

from __future__ import annotations

from qlora_api.job import GROUP

FIELD_MANAGER = "qlora-operator"
JOB_LABEL = f"{GROUP}/job"
"""On every child: the QLoRAJob's name. The operator watches nothing that has not this label."""
UID_LABEL = f"{GROUP}/job-uid"
"""On every child: the QLoRAJob's UID. Children of an earlier job of the same name are not taken for this one's."""
ATTEMPT_LABEL = f"{GROUP}/attempt"
"""On what trains: number of the attempt. What prepares has none."""
COMPONENT_LABEL = "app.kubernetes.io/component"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = {MANAGED_BY_LABEL: FIELD_MANAGER}
SWEEP_LABEL = f"{GROUP}/sweep"
"""On a QLoRAJob that is a trial: the name of its QLoRASweep. Which sweep controls it says its owner reference alone."""
CONFIG_ANNOTATION = f"{GROUP}/config"
"""On pods: the trainer's whole config, which the pod reads from a downward API file."""
PLAN_ANNOTATION = f"{GROUP}/plan"
"""On a child Job: the attempt as it was planned, so that nothing is lost if the operator dies before status has it."""
TEMPLATE_ANNOTATION = f"{GROUP}/template"
"""On a child Job: hash of its template. A waiting Job is recreated if its hash is not that of the current template."""
OPERATOR_ANNOTATION = f"{GROUP}/operator"
"""On a child Job: the release of the operator that made it."""
GENERATION_ANNOTATION = f"{GROUP}/generation"
"""On a child Job: generation of the QLoRAJob that it was made for."""

KUEUE_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
KUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
"""Label of a QLoRAJob that its child Jobs get too."""

CONTAINER = "trainer"
CACHE_VOLUME = "cache"
TMP_VOLUME = "tmp"
SERVICE = "qlora-trainers"
"""Headless Service through which the workers of all jobs of a namespace find each other."""
KEY_SECRET_PREFIX = "qlora-key-"  # noqa: S105 a name
"""Prefix of Secrets that hold jobs' keys. The chart's admission policy lets nobody but the operator create one of these
names."""
KEY_ENTRY = "key"
RENDEZVOUS_PORT = 29500
METRICS_PORT = 9400
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


def prepare_name(job: str) -> str:
    return f"{job}-prepare"


def attempt_name(job: str, number: int) -> str:
    return f"{job}-{number}"


def key_secret_name(job_uid: str) -> str:
    return f"{KEY_SECRET_PREFIX}{job_uid}"


def workers_policy_name(job_uid: str) -> str:
    return f"qlora-workers-{job_uid}"
