"""Decide how an attempt ended, from the states of its Job and its pods. Pure.

The pods of one attempt seldom agree. One runs out of memory, and its peers see a connection close; one node goes
away, and the others crash. The outcome that explains most counts, in the order of :func:`_weight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import timedelta

from qlora_api.contract import ExitCode, TerminationMessage, reason_of
from qlora_api.lifecycle import STUCK
from qlora_api.status import Attempt, Reason
from qlora_operator.names import CACHE_VOLUME, TMP_VOLUME
from qlora_operator.state.observed import JobState, Observed, ObservedJob, PodSnapshot

OVERDUE = timedelta(seconds=10)
"""A pod this long past its deletionTimestamp has no kubelet that could end it."""
RESULT_PATIENCE = timedelta(seconds=30)
"""Longest wait for the last pod of a finished Job to be observed: Jobs and pods arrive by separate watches."""
POD_GC = "DeletionByPodGC"
TAINT_MANAGER = "DeletionByTaintManager"
"""Reason of a pod's deletion if its node is not ready or has a NoExecute taint; in the second case the pod ends by
itself."""

_DECISIVE = frozenset(
    {
        ExitCode.USER_ERROR,
        ExitCode.NON_FINITE_LOSS,
        ExitCode.ADAPTER_REJECTED,
        ExitCode.OUT_OF_DEVICE_MEMORY,
        ExitCode.OUT_OF_HOST_MEMORY,
        ExitCode.CHECKPOINT_UNREADABLE,
        ExitCode.STORAGE_FAILED,
    }
)
"""Reasons reported by a pod that nothing else explains."""
_KILLED = 137
"""128 + SIGKILL: the kernel's for memory only where the kubelet says so. docs/decisions/0016."""
_OVERFULL = re.compile(r'Usage of EmptyDir volume "([^"]+)" exceeds the limit "([^"]+)"')
"""The kubelet's word of a pod that it evicts because of what the pod itself wrote, not for its node's sake."""
_OVER_LIMIT = re.compile(
    r"(?:Pod ephemeral local storage usage exceeds the total limit of containers"
    r'|Container \S+ exceeded its local ephemeral storage limit) "?(\w+)'
)
_VOLUME_LIMITS = {
    CACHE_VOLUME: "; the base model, the rows and what is published need a larger trainer.cacheSizeLimit",
    TMP_VOLUME: "; the adapter needs a larger trainer.tmpSizeLimit",
}


@dataclass(frozen=True)
class Ending:
    """End of an attempt, or of Prepare."""

    reason: Reason
    message: str
    exit_code: int | None = None
    node: str = ""
    termination_message: TerminationMessage | None = None
    removed: bool = False
    """Its Job was deleted, and all pods have ended since."""


def ending_of(attempt: int, workers: int, observed: Observed) -> Ending | None:
    """Return how an attempt ended; None while it runs or its pods are ending.

    Args:
        attempt: its number.
        workers: its pods.
        observed: what there is.

    """
    job, pods = observed.jobs.get(attempt), observed.pods_of(attempt)
    if job is not None and job.state is JobState.COMPLETE:
        return _completed(job, pods, observed)
    if lost := _lost(pods, observed):
        return lost
    if job is not None and job.state is JobState.FAILED:
        if _results_may_be_pending(job, pods, observed):
            return None
        return _won(pods) or _told(pods, workers, observed) or _from_job(job)
    if job is not None and not job.deleting and not _all_held(pods, workers):
        return None
    if any(not p.ended for p in pods):
        return None
    if won := _won(pods):
        return won
    told = _told(pods, workers, observed) or Ending(Reason.PREEMPTED, "its Job was deleted")
    return replace(told, removed=job is None or job.deleting)


def is_cut_short(attempt: int, observed: Observed) -> bool:
    """Return whether a trainer failed that its Job knows nothing of: another container keeps its pod from ending.

    Its peers would go on until they miss it. The Job controller ends them when a pod ends; here somebody else must.
    """
    return any(pod.held and pod.exit_code for pod in observed.pods_of(attempt))


def _all_held(pods: tuple[PodSnapshot, ...], workers: int) -> bool:
    """Return whether all trainers have ended, and a container that is not the operator's keeps a pod from ending."""
    ended = {p.index for p in pods if p.ended}
    return len(ended) >= workers and any(p.held for p in pods)


def _won(pods: tuple[PodSnapshot, ...]) -> Ending | None:
    """Return the end of an attempt whose first rank published the adapter, whatever became of the rest of its pods."""
    first = next((p for p in pods if p.index == 0 and p.exit_code == 0 and p.termination_message), None)
    return _of_pod(first, Reason.COMPLETED) if first else None


def _results_may_be_pending(job: ObservedJob, pods: tuple[PodSnapshot, ...], observed: Observed) -> bool:
    """Return whether the cache may lack the results of a failed Job's pods: the Job fails only when all have ended."""
    late = observed.now >= (job.ended or job.created) + RESULT_PATIENCE
    return not late and (not pods or any(not p.ended for p in pods))


def _completed(job: ObservedJob, pods: tuple[PodSnapshot, ...], observed: Observed) -> Ending | None:
    # A queue that took the attempt back and admitted it again has left pods of before, with words of their own.
    if won := _won(pods):
        return won
    mute = next((p for p in pods if p.index == 0 and p.exit_code == 0), None)
    if mute:
        text = f"pod {mute.name} exited with code 0, but its termination message cannot be read"
        text = f"{text}; does trainer.image have this version?"
        return Ending(Reason.CRASHED, text, 0, mute.node)
    if job.ended is None or observed.now < job.ended + RESULT_PATIENCE:
        return None
    return Ending(Reason.PREEMPTED, "it completed, but its pods were deleted before their result was read")


def is_lost(pod: PodSnapshot, observed: Observed) -> bool:
    """Return whether a pod was to end and does not, since its node is gone."""
    if pod.ended or pod.deletion_due is None:
        return False
    return pod.node in observed.lost_nodes or observed.now > pod.deletion_due + OVERDUE


def _lost(pods: tuple[PodSnapshot, ...], observed: Observed) -> Ending | None:
    for pod in pods:
        if is_lost(pod, observed):
            text = f"node {pod.node} is lost: it is not ready, and pod {pod.name} on it does not end"
            return Ending(Reason.NODE_LOST, text, node=pod.node)
    return None


def _told(pods: tuple[PodSnapshot, ...], workers: int, observed: Observed) -> Ending | None:
    """Return the pods' outcome that explains most; None if no pod reports one."""
    ends = [(weight, pod, reason) for pod in pods if (weighed := _weight(pod)) for weight, reason in (weighed,)]
    if not ends:
        return None
    _, pod, reason = min(ends, key=lambda end: (end[0], end[1].index))
    ending = _of_pod(pod, reason)
    if reason in STUCK and (unplaced := _never_placed(pods, workers, observed)):
        return replace(ending, reason=Reason.UNSCHEDULABLE, message=f"{unplaced}; the others waited: {ending.message}")
    if reason is Reason.PEER_LOST:
        missing = sorted(set(range(workers)) - {p.index for p in pods if p.exit_code is not None})
        if missing:
            names = ", ".join(str(index) for index in missing)
            return Ending(
                Reason.NODE_LOST,
                f"worker {names} ended without a termination message",
                ending.exit_code,
                "",
                ending.termination_message,
            )
    return ending


def _never_placed(pods: tuple[PodSnapshot, ...], workers: int, observed: Observed) -> str:
    """Describe the pod that was never scheduled or created, and for which the others waited; empty if there is none."""
    pod = next((p for p in pods if not p.node and p.exit_code is None), None)
    if pod is not None:
        return f"no node took pod {pod.name} ({pod.unschedulable or 'it was not scheduled'})"
    if observed.pods_refused and len(pods) < workers:
        return f"not all pods could be created ({observed.pods_refused})"
    return ""


def _weight(pod: PodSnapshot) -> tuple[int, Reason] | None:
    """Return how much a pod tells about an end, the lowest first; None where the pod says nothing."""
    if _overfull(pod):
        return 0, Reason.USER_ERROR
    code = pod.exit_code
    reason = Reason.CRASHED if code is None else _reason_of(code, pod)
    if code in _DECISIVE or reason is Reason.OUT_OF_HOST_MEMORY:
        return 0, reason
    if pod.disruption:
        gone = pod.disruption == POD_GC or (pod.disruption == TAINT_MANAGER and code is None)
        return 1, Reason.NODE_LOST if gone else Reason.PREEMPTED
    if code is None and pod.phase == "Failed" and pod.other_failure and not pod.pod_reason:
        return 3, Reason.CRASHED  # the trainer never began
    if code is None:
        # kubelet refused or ended it, without a container's end: UnexpectedAdmissionError, OutOfcpu, Evicted …
        # What no node ever took says nothing, even where Kubernetes marks it Failed as it clears it away.
        return (2, Reason.PREEMPTED) if pod.phase == "Failed" and pod.node else None
    if code == 0:
        return None
    if reason is Reason.NODE_LOST:
        return 1, reason
    if code == _KILLED and pod.deletion_due is not None:
        return 4, Reason.PREEMPTED  # it outlasted its grace period
    if reason in (Reason.PREEMPTED, Reason.PAUSED):
        return 4, reason
    if reason is Reason.PEER_LOST:
        return 5, reason
    return (2 if reason is Reason.STALLED else 3), reason


def _reason_of(code: int, pod: PodSnapshot | None = None) -> Reason:
    """As the contract has it, but a pause is told from other stops, and SIGKILL alone does not say who sent it."""
    termination = pod.termination_message if pod else None
    if code == ExitCode.PREEMPTED and termination and termination.reason is Reason.PAUSED:
        return Reason.PAUSED
    if code != _KILLED:
        return reason_of(code)
    if pod is not None and pod.exit_reason == "ContainerStatusUnknown":
        return Reason.NODE_LOST  # the kubelet lost sight of the container: its node was started anew
    if pod is not None and (
        pod.exit_reason == "OOMKilled" or (termination and termination.exit_code == ExitCode.OUT_OF_HOST_MEMORY)
    ):
        return Reason.OUT_OF_HOST_MEMORY
    return Reason.CRASHED


def _overfull(pod: PodSnapshot) -> str:
    """Return the remedy for a pod that was evicted for a volume of its own; empty for any other."""
    if pod.pod_reason != "Evicted":
        return ""
    if over := _OVER_LIMIT.search(pod.pod_message):
        what = f"its volumes and logs took more than its limit of {over[1]} (ephemeral-storage)"
        return f"pod {pod.name} was evicted: {what}"
    found = _OVERFULL.search(pod.pod_message)
    if found is None:
        return ""
    name, limit = found.groups()
    what = f'pod {pod.name} was evicted: its volume "{name}" took more than its limit of {limit}'
    if name in _VOLUME_LIMITS:
        what += f"{_VOLUME_LIMITS[name]} (a value of the operator's chart)"
    return what


def _of_pod(pod: PodSnapshot, reason: Reason) -> Ending:
    termination = pod.termination_message
    if overfull := _overfull(pod):
        text = overfull
    elif termination is not None and termination.message:
        text = termination.message
    elif pod.exit_code is None and pod.other_failure and not (pod.disruption or pod.pod_reason):
        text = f"pod {pod.name} failed before its trainer started: {pod.other_failure}"
    elif pod.exit_code is None:
        cause = pod.disruption or pod.pod_reason or "deleted"
        text = f"pod {pod.name} was ended ({cause}) {pod.pod_message[-500:]}".rstrip()
    else:
        cause = pod.exit_reason or pod.pod_reason or "no reason"
        text = f"pod {pod.name} ended with exit code {pod.exit_code} ({cause}) and no termination message"
        if message := pod.message or pod.pod_message:
            text += f": {message[-500:]}"
    return Ending(reason, text, pod.exit_code, pod.node, termination)


def _from_job(job: ObservedJob) -> Ending:
    """Read the end from the Job when the pods are gone: its controller names exit code or condition in its message."""
    code = re.search(r"exit code (\d+)", job.message)
    if code:
        return Ending(_reason_of(int(code[1])), job.message, int(code[1]))
    if "DisruptionTarget" in job.message:
        return Ending(Reason.PREEMPTED, job.message)
    return Ending(Reason.CRASHED, job.message or "its Job failed without a message")


def as_suspended(attempt: Attempt, ending: Ending) -> Ending:
    """Return the end of an attempt that was told to stop."""
    told = not ending.removed or ending.termination_message is not None
    resumes = "stopped; it resumes from the last checkpoint"
    stopped = resumes if attempt.running_time else "stopped before all its pods ran"
    return replace(ending, reason=Reason.SUSPENDED, message=ending.message if told else stopped)


def closed(attempt: Attempt, ending: Ending, observed: Observed) -> Attempt:
    """Return the attempt with its end."""
    termination = ending.termination_message
    progress = termination.progress if termination else None
    report = observed.report if observed.report and observed.report.attempt == attempt.number else None
    first = report.first_step if report else attempt.first_step
    last = progress.step if progress else report.step if report else attempt.last_step
    return attempt.model_copy(
        update={
            "end_time": observed.now,
            "reason": ending.reason,
            "message": ending.message[:4096],
            "exit_code": ending.exit_code,
            "node": ending.node or attempt.node,
            "first_step": first if termination is None or termination.first_step is None else termination.first_step,
            "last_step": last,
            "loss": progress.loss if progress else None,
            "best_eval_loss": progress.best_eval_loss if progress else None,
        }
    )
