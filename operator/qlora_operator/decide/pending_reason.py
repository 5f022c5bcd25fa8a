"""Decide why an attempt that exists does not run yet, in words a person can act on. Pure."""

from __future__ import annotations

import re

from qlora_api.spec import QLoRAJobSpec
from qlora_api.status import Reason
from qlora_operator.names import CONTAINER
from qlora_operator.profiles import UNKNOWN_PROFILE
from qlora_operator.state.observed import JobState, Observed, PodSnapshot

_BAD_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_BAD_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


def pending_reason(spec: QLoRAJobSpec, attempt: int, workers: int, seen: Observed) -> tuple[Reason, str]:
    """Reason and message of a child Job whose pods are not all ready."""
    job, pods = seen.jobs.get(attempt), [p for p in seen.pods_of(attempt) if not p.gone]
    if seen.child_refused or (seen.pods_refused and len(pods) < workers):
        return refusal(seen.child_refused or seen.pods_refused)
    if job is not None and job.state is JobState.SUSPENDED:
        return Reason.QUEUED, _queued(spec.scheduling.queue, workers)
    for pod in pods:
        if found := _pod_waits(pod):
            return found
    ready = sum(p.ready for p in pods)
    return Reason.STARTING, f"{ready} of {workers} pods are ready"


def _queued(queue: str | None, workers: int) -> str:
    if queue:
        return f'waits for queue "{queue}" to admit {workers} pods'
    return (
        "the cluster's queueing suspends jobs that name no queue: set spec.scheduling.queue to one of this namespace, "
        "then spec.suspend to true and back to false"
    )


def prepare_queued(queue: str | None) -> str:
    """Return why Prepare is suspended, in words."""
    if queue:
        return f'Prepare waits for queue "{queue}" (prepare.queue, a value of the operator\'s chart) to admit it'
    return (
        "the cluster's queueing suspends Prepare, which names no queue: have the chart's prepare.queue name a "
        "LocalQueue of this namespace that covers cpu and memory, or Kueue's managedJobsNamespaceSelector leave the "
        "namespace out"
    )


def refusal(said: str) -> tuple[Reason, str]:
    """Sort what the API server or the Job controller said when it would not make something."""
    if "failed quota" in said and "must specify limits.cpu" in said:
        return Reason.REFUSED, f"{said}; have trainer.limitCpu set to true, a value of the operator's chart"
    if "exceeded quota" in said:
        return Reason.QUOTA_EXCEEDED, f"{said}; free some of the quota, or ask for fewer GPUs in spec.parallelism"
    if UNKNOWN_PROFILE in said:
        return Reason.MISSING_REFERENCE, said
    if "no PriorityClass with name" in said:
        return Reason.MISSING_REFERENCE, f"{said}; have it created, or correct spec.scheduling.priorityClassName"
    return Reason.REFUSED, said


def _pod_waits(pod: PodSnapshot) -> tuple[Reason, str] | None:
    if pod.unschedulable:
        return _unschedulable(pod)
    if pod.waiting_container != CONTAINER and pod.waiting in (*_BAD_IMAGE, *_BAD_CONFIG, "CrashLoopBackOff"):
        text = (
            f'pod {pod.name} waits for its container "{pod.waiting_container}" ({pod.waiting}): {pod.waiting_message}'
        )
        return Reason.STARTING, f"{text}; it is not the operator's: who has it added to pods must mend it"
    if pod.waiting in _BAD_IMAGE:
        text = (
            f"the image cannot be pulled ({pod.waiting}): {pod.waiting_message}; the operator's trainer.image is wrong"
        )
        return Reason.IMAGE_UNAVAILABLE, f"{text}, or its pull secret is missing in this namespace"
    if pod.waiting in _BAD_CONFIG:
        if "not found" in pod.waiting_message:
            return Reason.MISSING_REFERENCE, f"{pod.waiting_message}; create it, or correct the job's credentials"
        return Reason.REFUSED, f"{pod.waiting}: {pod.waiting_message}"
    return None


def _unschedulable(pod: PodSnapshot) -> tuple[Reason, str]:
    said = pod.unschedulable
    claim = re.search(r'persistentvolumeclaim "([^"]+)" (not found|is being deleted)', said)
    if claim:
        return (
            Reason.MISSING_REFERENCE,
            f'claim "{claim[1]}" {claim[2]}; create it, or correct the job\'s pvc:// source',
        )
    remedies = []
    if gpu := re.search(r"Insufficient (\S+/\S+?)[,.]", said):
        remedies.append(f"no node has as many free {gpu[1]} as spec.parallelism.gpusPerWorker asks for")
    if "didn't match Pod's node affinity/selector" in said:
        remedies.append("spec.scheduling.nodeSelector matches no node")
    if "untolerated taint" in said:
        remedies.append("nodes have taints that spec.scheduling.tolerations does not name")
    remedies += [f"no node has enough free {what}" for what in ("cpu", "memory") if f"Insufficient {what}" in said]
    if "Insufficient ephemeral-storage" in said:
        remedies.append(
            "no node has the free disk that trainer.ephemeralStorage asks for (a value of the operator's chart)"
        )
    words = "; ".join(remedies)
    return Reason.UNSCHEDULABLE, f"{words} ({said})" if words else said
