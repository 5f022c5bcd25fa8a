"""Decide why an attempt does not run yet, with a message that names a remedy. Pure."""

from __future__ import annotations

import re

from qlora_api.pod_reasons import IMAGE_REASONS
from qlora_api.spec import QLoRAJobSpec
from qlora_api.status import Reason
from qlora_operator.decide.refusal import explain_refusal
from qlora_operator.names import CONTAINER
from qlora_operator.state.observed import JobState, Observed, ObservedJob, PodSnapshot

_BAD_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_NODE_TAINTS = re.compile(r"\{(?:[^{}/]*\.)?(?:kubernetes\.io|k8s\.io)/|\{(?:ToBeDeleted|DeletionCandidate)")
"""Taints that say how a node is, or that it is the control plane's: no job is to tolerate them."""
MOST_PODS = 3
"""Named in one message."""


def pending_reason(spec: QLoRAJobSpec, attempt: int, workers: int, observed: Observed) -> tuple[Reason, str]:
    """Return the reason and message of a child Job whose pods are not all ready."""
    job = observed.jobs.get(attempt)
    pods = [p for p in observed.pods_of(attempt) if not p.gone and p.deletion_due is None]
    if observed.create_error or (observed.pods_refused and len(pods) < workers):
        return explain_refusal(observed.create_error or observed.pods_refused)
    if job is not None and job.state is JobState.SUSPENDED:
        return Reason.QUEUED, _queued(spec.scheduling.queue, workers, job)
    found = [waits for pod in pods if (waits := _pod_waits(pod))]
    if found:  # what a person must mend comes first
        return min(found, key=lambda each: each[0] in (Reason.UNSCHEDULABLE, Reason.QUEUED, Reason.STARTING))
    return Reason.STARTING, _starting(pods, workers)


def _starting(pods: list[PodSnapshot], workers: int) -> str:
    text = f"{sum(p.ready for p in pods)} of {workers} pods are ready"
    waits = [f"{p.name} on {p.node or 'no node yet'}" for p in pods if not p.ready][:MOST_PODS]
    return f"{text}; waiting for {', '.join(waits)}" if waits else text


def _queued(queue: str | None, workers: int, job: ObservedJob) -> str:
    if queue:
        return f'Job {job.name} waits for queue "{queue}" to admit {workers} pods'
    return (
        f"Job {job.name} is suspended by the cluster's queueing, which holds jobs that name no queue: set "
        "spec.scheduling.queue to one of this namespace"
    )


def prepare_queued(queue: str | None) -> str:
    """Return the message of a suspended Prepare."""
    if queue:
        return f'Prepare waits for queue "{queue}" (prepare.queue, a value of the operator\'s chart) to admit it'
    return (
        "the cluster's queueing suspends Prepare, which names no queue: have the chart's prepare.queue name a "
        "LocalQueue of this namespace that covers cpu and memory, or Kueue's managedJobsNamespaceSelector leave the "
        "namespace out"
    )


def _pod_waits(pod: PodSnapshot) -> tuple[Reason, str] | None:
    if pod.gates:
        return Reason.QUEUED, f"pod {pod.name} is held back by scheduling gates: {pod.gates}"
    if pod.unschedulable:
        return _unschedulable(pod)
    if pod.waiting_container != CONTAINER and pod.waiting in (*IMAGE_REASONS, *_BAD_CONFIG, "CrashLoopBackOff"):
        text = f'pod {pod.name} waits for its container "{pod.waiting_container}"'
        who = "the operator did not add it: whoever adds it to pods must fix it"
        return Reason.STARTING, f"{text} ({pod.waiting}: {pod.waiting_message}); {who}"
    if pod.waiting in IMAGE_REASONS:
        text = f"the image of pod {pod.name} cannot be pulled ({pod.waiting}): {pod.waiting_message}"
        remedy = "correct the operator's trainer.image, or create the pull secret in this namespace"
        return Reason.IMAGE_UNAVAILABLE, f"{text}; {remedy}"
    if pod.waiting in _BAD_CONFIG:
        if "not found" in pod.waiting_message:
            remedy = "create it, or correct the job's credentials"
            return Reason.MISSING_REFERENCE, f"pod {pod.name}: {pod.waiting_message}; {remedy}"
        remedy = "the node's kubelet refuses the container: see the pod's events"
        return Reason.REFUSED, f"pod {pod.name}: {pod.waiting}: {pod.waiting_message}; {remedy}"
    return None


def _unschedulable(pod: PodSnapshot) -> tuple[Reason, str]:
    message = pod.unschedulable
    claim = re.search(r'persistentvolumeclaim "([^"]+)" (not found|is being deleted)', message)
    if claim:
        return (
            Reason.MISSING_REFERENCE,
            f'claim "{claim[1]}" {claim[2]}; create it, or correct the job\'s pvc:// source',
        )
    remedies = []
    if gpu := re.search(r"Insufficient (\S+/\S+?)[,.]", message):
        remedies.append(f"no node has as many free {gpu[1]} as spec.parallelism.gpusPerWorker asks for")
    if "didn't match Pod's node affinity/selector" in message:
        remedies.append("spec.scheduling.nodeSelector matches no node")
    remedies += [f"no node has enough free {what}" for what in ("cpu", "memory") if f"Insufficient {what}" in message]
    if "Insufficient ephemeral-storage" in message:
        remedies.append(
            "no node has the free disk that trainer.ephemeralStorage asks for (a value of the operator's chart)"
        )
    if taint := _taint(message, alone=not remedies):
        remedies.append(f"nodes have {taint} that spec.scheduling.tolerations does not name")
    advice = "; ".join(remedies)
    text = f"{advice} ({message})" if advice else message
    return Reason.UNSCHEDULABLE, f"pod {pod.name}: {text}"


def _taint(message: str, *, alone: bool) -> str:
    """Return which taint keeps pods out; empty for none that a job could tolerate.

    Newer schedulers do not name it. Then it is the reason only where there is no other one.
    """
    named = re.findall(r"untolerated taint (\{[^}]*\})", message)
    if named := [taint for taint in named if not _NODE_TAINTS.match(taint)]:
        return f"taint {named[0]}"
    return "taints" if alone and "untolerated taint(s)" in message else ""
