"""Define the operator's view of the cluster: small frozen values, cut out of API objects.

A decision never reads an API object, and the operator keeps none in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any

from qlora_api.contract import ProgressReport, TerminationMessage
from qlora_api.job import GROUP, KIND
from qlora_api.untrusted.printable import printable
from qlora_operator.names import (
    ATTEMPT_LABEL,
    CONTAINER,
    GENERATION_ANNOTATION,
    INDEX_LABEL,
    JOB_LABEL,
    OPERATOR_ANNOTATION,
    PLAN_ANNOTATION,
    TEMPLATE_ANNOTATION,
    UID_LABEL,
    attempt_name,
    prepare_name,
)
from qlora_operator.state.reports import read_termination_message

PREPARE = 0
"""Attempt number of what prepares."""
LONGEST_TEXT = 4096
"""Characters that are kept of a text: a kubelet's termination message has no more bytes."""


LONGEST_NAME, LONGEST_NUMBER = 253, 19
"""Characters of a name, and digits of a number, in annotations."""


class NotOwnedError(Exception):
    """An object has the operator's labels and not the controller that the operator gave its own."""


class JobState(StrEnum):
    ACTIVE = "Active"
    SUSPENDED = "Suspended"
    """By a queue: not admitted yet, or sent back."""
    FAILING = "Failing"
    """Failed, with pods that still end."""
    FAILED = "Failed"
    COMPLETE = "Complete"


@dataclass(frozen=True, slots=True)
class ObservedJob:
    """A child batch/v1 Job."""

    name: str
    uid: str
    version: int = field(compare=False)
    """resourceVersion. Comparable since Kubernetes 1.35 (KEP-5504), and in etcd's form always was."""
    owner: str
    """UID of the QLoRAJob that controls it."""
    attempt: int
    """PREPARE for the one that prepares."""
    state: JobState
    ready: int
    """Pods that are ready."""
    deleting: bool
    message: str
    """Message of the condition that says how it failed, or why it creates no pods."""
    failed_reason: str
    """Reason of that condition: PodFailurePolicy, BackoffLimitExceeded, DeadlineExceeded …"""
    plan: str
    """JSON of the planned attempt."""
    created: datetime
    ended: datetime | None = None
    """Time at which it completed or failed; None while it runs."""
    template: str = ""
    """Hash of what its pods are made of; empty in those of earlier versions."""
    operator: str = ""
    """Release of the operator that made it; empty in those of earlier versions."""
    generation: int = 0
    """Generation of the QLoRAJob that it was created for."""


@dataclass(frozen=True, slots=True)
class PodSnapshot:
    """One pod of a child Job."""

    name: str
    uid: str
    version: int = field(compare=False)
    owner: str
    """UID of its QLoRAJob, by its label."""
    attempt: int
    index: int
    """Completion index: the worker's number."""
    node: str
    ip: str
    phase: str
    ready: bool
    """The pod is ready, with all that others have added to it."""
    waiting: str
    """Reason why a container waits: ImagePullBackOff, CreateContainerConfigError …"""
    waiting_message: str
    unschedulable: str
    """The scheduler's message, where no node was found."""
    disruption: str
    """Reason of the condition DisruptionTarget: PreemptionByScheduler, DeletionByTaintManager, EvictionByEvictionAPI"""
    created: datetime
    exit_code: int | None = None
    exit_reason: str = ""
    """The container runtime's: OOMKilled, Error, Completed."""
    message: str = ""
    """The termination message as written; see :meth:`word`."""
    pod_reason: str = ""
    """Reason why the kubelet refused or ended the whole pod: Evicted, UnexpectedAdmissionError, OutOfcpu …"""
    pod_message: str = ""
    deletion_due: datetime | None = None
    """Time by which it must be gone: deletionTimestamp, which includes the grace period."""
    gone: bool = False
    """Deleted; kept until its attempt is closed."""
    controller: str = ""
    """UID of the Job that controls it."""
    trainer_ready: bool = False
    """The trainer's container runs, whatever other containers do."""
    held: bool = False
    """The trainer's container has ended, and another one that no kubelet ends keeps the pod from ending."""
    waiting_container: str = CONTAINER
    """Name of the container that waits."""
    other_ip: str = ""
    """Address of the other family, in a dual-stack cluster."""
    other_failure: str = ""
    """Failure of another container than the trainer's, with its name; empty if none failed."""
    gates: str = ""
    """Names of the scheduling gates by which somebody holds the pod back."""

    @property
    def termination_message(self) -> TerminationMessage | None:
        """The trainer's termination message; None where it left none that can be read."""
        return read_termination_message(self.message) if self.message else None

    @property
    def ended(self) -> bool:
        return self.exit_code is not None or self.phase in ("Succeeded", "Failed") or self.gone


@dataclass(frozen=True)
class Observed:
    """All that one decision may depend on, apart from the QLoRAJob itself."""

    now: datetime
    jobs: Mapping[int, ObservedJob] = field(default_factory=dict)
    """Child Jobs by attempt."""
    pods: tuple[PodSnapshot, ...] = ()
    report: ProgressReport | None = None
    """The newest answer of the running attempt's rank 0, or of Prepare."""
    stage_start: datetime | None = None
    """Start of the stage in this answer."""
    lost_nodes: frozenset[str] = frozenset()
    """Nodes that are not ready, of those whose pods do not end though they should have."""
    pods_refused: str = ""
    """The Job controller's message if it cannot create pods: a quota, an admission policy."""
    create_error: str = ""
    """Reason why no child can be created: its profile, the missing gang scheduler, or the API server's refusal just
    now."""
    unknown_fields: tuple[str, ...] = ()
    """Paths of the job's spec that this version does not know."""
    inherited: frozenset[str] = frozenset()
    """UIDs of Jobs that other releases of the operator had made when this process began."""
    memory_correction: float = 1.0
    """Factor on predicted memory that this cluster has learned for the GPU that the job gets."""

    def pods_of(self, attempt: int) -> tuple[PodSnapshot, ...]:
        """Return the pods of an attempt; if its Job was recreated, only those of the current Job."""
        job = self.jobs.get(attempt)
        pods = (p for p in self.pods if p.attempt == attempt and (job is None or p.controller == job.uid))
        return tuple(sorted(pods, key=lambda p: p.index))

    def without_reports(self) -> Observed:
        """Return the same without what pods say of themselves."""
        return replace(self, report=None, stage_start=None, pods=tuple(replace(pod, message="") for pod in self.pods))

    @cached_property
    def living(self) -> tuple[PodSnapshot, ...]:
        return tuple(p for p in self.pods if not p.gone)


def parse_time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def observe_job(body: Mapping[str, Any]) -> ObservedJob:
    """Cut out of a batch/v1 Job what decisions depend on.

    Raises:
        NotOwnedError: the QLoRAJob that its labels name does not control it, or never gave it this name.

    """
    meta, status = body["metadata"], body.get("status") or {}
    annotations = meta.get("annotations") or {}
    conditions = {c["type"]: c for c in status.get("conditions", ()) if c["status"] == "True"}
    failed = conditions.get("Failed") or conditions.get("FailureTarget")
    if "Complete" in conditions or "SuccessCriteriaMet" in conditions:
        state = JobState.COMPLETE
    elif failed:
        state = JobState.FAILED if "Failed" in conditions else JobState.FAILING
    elif body["spec"].get("suspend"):
        state = JobState.SUSPENDED
    else:
        state = JobState.ACTIVE
    ending = failed or conditions.get("Complete") or conditions.get("SuccessCriteriaMet") or {}
    owner, job = controller_of(meta, GROUP, KIND), meta["labels"][JOB_LABEL]
    attempt = int(meta["labels"].get(ATTEMPT_LABEL, PREPARE))
    if owner["name"] != job or meta["name"] != (attempt_name(job, attempt) if attempt else prepare_name(job)):
        raise NotOwnedError(f"Job {meta['name']} is not one that a QLoRAJob named {job} has")
    return ObservedJob(
        name=meta["name"],
        uid=meta["uid"],
        version=int(meta["resourceVersion"]),
        owner=owner["uid"],
        attempt=attempt,
        state=state,
        ready=status.get("ready") or 0,
        deleting="deletionTimestamp" in meta,
        message=_text(ending, "message"),
        failed_reason=_text(failed or {}, "reason"),
        plan=_text(annotations, PLAN_ANNOTATION),
        created=_required_time(meta["creationTimestamp"]),
        ended=parse_time(ending.get("lastTransitionTime")),
        template=_text(annotations, TEMPLATE_ANNOTATION),
        operator=_text(annotations, OPERATOR_ANNOTATION)[:LONGEST_NAME],
        generation=_number(annotations.get(GENERATION_ANNOTATION)),
    )


def observe_pod(body: Mapping[str, Any]) -> PodSnapshot:
    """Cut out of a Pod what decisions depend on.

    Raises:
        NotOwnedError: no Job controls it.

    """
    meta, status = body["metadata"], body.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions", ())}
    gates = ", ".join(gate["name"] for gate in body["spec"].get("schedulingGates") or ())
    containers = status.get("containerStatuses") or ()
    trainer: Mapping[str, Any] = next((c for c in containers if c["name"] == CONTAINER), {"state": {}})
    others = [c for c in (*(status.get("initContainerStatuses") or ()), *containers) if c["name"] != CONTAINER]
    waits = next((c for c in (trainer, *others) if _waiting(c).get("reason") not in _STARTING), trainer)
    waiting, ended = _waiting(waits), trainer["state"].get("terminated") or {}
    scheduled = conditions.get("PodScheduled", {})
    disrupted = conditions.get("DisruptionTarget", {})
    return PodSnapshot(
        name=meta["name"],
        uid=meta["uid"],
        version=int(meta["resourceVersion"]),
        owner=meta["labels"].get(UID_LABEL, ""),
        attempt=int(meta["labels"].get(ATTEMPT_LABEL, PREPARE)),
        index=int(meta["labels"].get(INDEX_LABEL, 0)),
        node=body["spec"].get("nodeName", ""),
        ip=status.get("podIP", ""),
        other_ip=next((each["ip"] for each in (status.get("podIPs") or ())[1:]), ""),
        phase=status.get("phase", "Pending"),
        ready=conditions.get("Ready", {}).get("status") == "True",
        waiting=_text(waiting, "reason"),
        waiting_message=_text(waiting, "message"),
        unschedulable=_text(scheduled, "message") if scheduled.get("status") == "False" and not gates else "",
        disruption=_text(disrupted, "reason") if disrupted.get("status") == "True" else "",
        created=_required_time(meta["creationTimestamp"]),
        exit_code=ended.get("exitCode"),
        exit_reason=_text(ended, "reason"),
        message=_text(ended, "message"),
        pod_reason=_text(status, "reason"),
        pod_message=_text(status, "message"),
        deletion_due=parse_time(meta.get("deletionTimestamp")),
        controller=controller_of(meta, "batch", "Job")["uid"],
        trainer_ready=bool(trainer.get("ready")),
        held=bool(ended) and any("terminated" not in c["state"] for c in containers),
        waiting_container=printable(waits.get("name", CONTAINER)),
        gates=printable(gates[:LONGEST_TEXT]),
        other_failure=next((text for c in others if (text := _failure(c))), ""),
    )


_STARTING = (None, "ContainerCreating", "PodInitializing")
"""Reasons of containers that wait for nothing but their turn."""


def _waiting(container: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = container["state"].get("waiting") or {}
    return found


def _failure(container: Mapping[str, Any]) -> str:
    """Return how a container failed; empty where it did not."""
    ended = container["state"].get("terminated") or {}
    code = ended.get("exitCode") or 0
    if not code:
        return ""
    text = (
        f'container "{printable(container["name"])}" ended with exit code {code} ({_text(ended, "reason") or "Error"})'
    )
    return f"{text}: {message[-500:]}" if (message := _text(ended, "message")) else text


def controller_of(meta: Mapping[str, Any], group: str, kind: str) -> Mapping[str, str]:
    """Return the owner reference of an object's controller.

    Raises:
        NotOwnedError: it has none, or one of another kind.

    """
    for owner in meta.get("ownerReferences") or ():
        if owner.get("controller"):
            if owner["kind"] == kind and owner["apiVersion"].partition("/")[0] == group:
                return dict(owner)
            break
    raise NotOwnedError(f"{meta['name']} is not controlled by a {kind} of {group}")


def _text(body: Mapping[str, Any], name: str) -> str:
    """Return an untrusted text, shortened and made printable; empty if there is none."""
    return printable((body.get(name) or "")[:LONGEST_TEXT])


def _number(text: str | None) -> int:
    """Return an untrusted number; 0 if it is not a number."""
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < LONGEST_NUMBER else 0


def _required_time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def planned(job: ObservedJob) -> dict[str, Any]:
    """Return the attempt as planned; empty where the annotation was taken away."""
    try:
        found = json.loads(job.plan)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
