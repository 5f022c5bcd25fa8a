"""Names of the API and of what the operator makes, without importing the types; a test holds them together."""

from __future__ import annotations

import re

GROUP = "qlora.dev"
API_VERSION = "qlora.dev/v1alpha1"
KIND = "QLoRAJob"
PLURAL = "qlorajobs"
CRD = f"{PLURAL}.{GROUP}"
SWEEP_KIND = "QLoRASweep"
SWEEP_PLURAL = "qlorasweeps"
SWEEP_CRD = f"{SWEEP_PLURAL}.{GROUP}"

JOB_LABEL = f"{GROUP}/job"
ATTEMPT_LABEL = f"{GROUP}/attempt"
COMPONENT_LABEL = "app.kubernetes.io/component"
SWEEP_LABEL = f"{GROUP}/sweep"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
PART_OF_OPERATOR = "app.kubernetes.io/part-of=qlora-operator"
OPERATOR_SELECTOR = f"{PART_OF_OPERATOR},{COMPONENT_LABEL}=operator"
RETRY_ANNOTATION = f"{GROUP}/retry-of"
"""On a job that 'qlora retry' made: the job whose spec it has."""
CONTAINER = "trainer"
FIELD_MANAGER = "qlora-cli"

CHART = "charts/qlora-operator"
"""Chart that installs the operator, as remedies name it."""
LONGEST_NAME = 52
NAME_PATTERN = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"


def is_name(text: str) -> bool:
    """Tell whether a job may have this name, which then is no path either."""
    return len(text) <= LONGEST_NAME and re.fullmatch(NAME_PATTERN, text) is not None


def jobs_path(namespace: str | None = None, name: str = "") -> str:
    """Path of a job, of a namespace's jobs, or of all jobs."""
    where = f"/namespaces/{namespace}" if namespace else ""
    return f"/apis/{API_VERSION}{where}/{PLURAL}" + (f"/{name}" if name else "")


def sweeps_path(namespace: str | None = None, name: str = "") -> str:
    """Path of a sweep, of a namespace's sweeps, or of all sweeps."""
    where = f"/namespaces/{namespace}" if namespace else ""
    return f"/apis/{API_VERSION}{where}/{SWEEP_PLURAL}" + (f"/{name}" if name else "")


def core_path(namespace: str, plural: str, name: str = "") -> str:
    """Path in the core API: pods, events, secrets …"""
    return f"/api/v1/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")
