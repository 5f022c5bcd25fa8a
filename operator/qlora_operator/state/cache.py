"""Cache what the operator knows: per QLoRAJob a few kilobytes of JSON, per child a frozen value.

Filled by watches and by the answers to the operator's own writes; of two views of one object the newer one counts, so a
decision never falls behind what this process itself has done.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from qlora_api.contract import ProgressReport
from qlora_api.job import GROUP, QLoRAJob
from qlora_api.sweep.sweep import SWEEP_KIND
from qlora_api.untrusted.printable import printable
from qlora_operator.names import JOB_LABEL, KUEUE_PRIORITY_LABEL, SWEEP_LABEL
from qlora_operator.state.observed import (
    LONGEST_TEXT,
    NotOwnedError,
    ObservedJob,
    PodSnapshot,
    observe_job,
    observe_pod,
)

Key = tuple[str, str]
"""Namespace and name of a QLoRAJob."""
KEPT_META = ("name", "namespace", "uid", "generation", "resourceVersion", "creationTimestamp", "deletionTimestamp")
_KEPT_LABELS = (KUEUE_PRIORITY_LABEL, SWEEP_LABEL)
_KEPT_OWNER = ("apiVersion", "kind", "name", "uid", "controller")


@dataclass(frozen=True, slots=True)
class SweepRef:
    """Name and UID of a QLoRASweep."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A QLoRAJob without what nobody here reads."""

    uid: str
    version: int
    body: bytes
    is_finished: bool
    """It succeeded or failed."""
    is_quiescent: bool
    """It is over, does not go by itself, and its status is of its generation."""
    attempts: frozenset[str] = frozenset()
    """UIDs of the Jobs of its attempts, as status has them."""
    sweep: SweepRef | None = None
    """The QLoRASweep that controls it."""

    def parse(self) -> tuple[QLoRAJob, tuple[str, ...]]:
        """Return the job, with the paths of spec that this version does not know.

        Raises pydantic's ValidationError where the API server took a value that this version refuses.
        """
        try:
            return QLoRAJob.model_validate_json(self.body), ()
        except ValidationError:
            return QLoRAJob.read(json.loads(self.body))


_NOBODY = StoredJob("", 0, b"", is_finished=False, is_quiescent=False)


@dataclass
class Known:
    """All that is known around one QLoRAJob."""

    job: StoredJob | None = None
    children: dict[str, ObservedJob] = field(default_factory=dict)
    """By UID."""
    pods: dict[str, PodSnapshot] = field(default_factory=dict)
    """By UID."""
    report: ProgressReport | None = None
    stage_start: datetime | None = None
    """Start of the stage in the report."""
    pods_refused: str = ""
    deleted: frozenset[str] = frozenset()
    """UIDs of what this process has had deleted. A watch says so later, maybe after one that wakes the job."""
    made: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Owner and attempt of each child Job that was ever seen, by UID: pods outlive their Job."""

    def forget_report(self) -> None:
        """Forget what a pod told last."""
        self.report = self.stage_start = None

    def own_children(self) -> tuple[ObservedJob, ...]:
        """Child Jobs that the QLoRAJob controls."""
        return tuple(child for child in self.children.values() if self.job and child.owner == self.job.uid)

    def own_pods(self) -> tuple[PodSnapshot, ...]:
        """Pods that a child Job of the QLoRAJob controls. What others label as theirs is not among them."""
        return tuple(pod for pod in self.pods.values() if self.owns(pod))

    def owns(self, pod: PodSnapshot) -> bool:
        """Return whether a pod is controlled by a Job that the QLoRAJob controls, of the attempt that the pod says."""
        return self.job is not None and self.made.get(pod.controller) == (self.job.uid, pod.attempt)

    def forget_made(self) -> None:
        """Drop records of Jobs that are gone and that no pod or attempt speaks of any more."""
        needed = {pod.controller for pod in self.pods.values()} | self.children.keys() | (self.job or _NOBODY).attempts
        self.made = {uid: made for uid, made in self.made.items() if uid in needed}


class ObjectCache:
    """Everything known, by QLoRAJob.

    Args:
        wake_sweep: told the key of a QLoRASweep when one of its trials has changed or is gone.

    """

    def __init__(self, wake_sweep: Callable[[Key], None] = lambda _: None) -> None:
        self._known: dict[Key, Known] = {}
        self._trials: defaultdict[str, set[Key]] = defaultdict(set)
        """QLoRAJobs by the UID of the QLoRASweep that controls them."""
        self._wake_sweep = wake_sweep

    def trials_of(self, sweep: str) -> list[tuple[str, StoredJob]]:
        """Return names and QLoRAJobs that a QLoRASweep controls, by its UID."""
        return [(key[1], job) for key in self._trials.get(sweep, ()) if (job := self._known[key].job)]

    def _index_trial(self, key: Key, before: StoredJob | None, after: StoredJob | None) -> None:
        """Note which sweep controls a job, and tell those that it concerns."""
        for sweep in {job.sweep for job in (before, after) if job and job.sweep}:
            if after and after.sweep == sweep:
                self._trials[sweep.uid].add(key)
            else:
                self._trials[sweep.uid].discard(key)
                if not self._trials[sweep.uid]:
                    del self._trials[sweep.uid]
            self._wake_sweep((key[0], sweep.name))

    def __iter__(self) -> Iterator[tuple[Key, Known]]:
        return iter(self._known.items())

    def __getitem__(self, key: Key) -> Known:
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Known()
        return known

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def take_refusal(self, event: Mapping[str, Any]) -> Key | None:
        """Take in an Event in which the Job controller says that it cannot make pods; None where it is no news."""
        child, text = event["involvedObject"], printable(event.get("message", "")[:LONGEST_TEXT])
        key = child.get("namespace", ""), child.get("name", "").rpartition("-")[0]
        known = self._known.get(key)
        if known is None or child.get("uid") not in known.children or known.pods_refused == text:
            return None
        known.pods_refused = text
        return key

    def held_children(self) -> Iterator[tuple[Key, str]]:
        """Keys and UIDs of all child Jobs."""
        return ((key, uid) for key, known in self._known.items() for uid in known.children)

    def held_pods(self) -> Iterator[tuple[Key, str]]:
        """Keys and UIDs of all pods that are not known to be gone."""
        return ((key, uid) for key, known in self._known.items() for uid, pod in known.pods.items() if not pod.gone)

    def forget(self, key: Key) -> None:
        """Drop a job that is gone, once its children are."""
        known = self._known.get(key)
        if known and known.job is None and not known.children and not known.pods:
            del self._known[key]

    def take_job(self, body: Mapping[str, Any]) -> Key | None:
        """Take in a QLoRAJob; its key, None where it is no news."""
        meta = body["metadata"]
        key = meta["namespace"], meta["name"]
        known = self[key]
        version = int(meta["resourceVersion"])
        if known.job and known.job.uid == meta["uid"] and version <= known.job.version:
            return None
        if known.job and known.job.uid != meta["uid"]:
            known.forget_report()
            known.pods_refused = ""
        is_finished = _is_finished(body)
        is_quiescent = is_finished and is_observed(body) and _is_kept(body)
        text = json.dumps(kept_of(body), separators=(",", ":")).encode()
        attempts = {a["jobUid"]: a["number"] for a in (body.get("status") or {}).get("attempts") or () if "jobUid" in a}
        before = known.job
        known.job = StoredJob(
            meta["uid"], version, text, is_finished, is_quiescent, frozenset(attempts), _sweep_of(meta)
        )
        self._index_trial(key, before, known.job)
        known.made |= {uid: (meta["uid"], number) for uid, number in attempts.items()}
        known.forget_made()
        return key

    def drop_job(self, body: Mapping[str, Any]) -> Key:
        meta = body["metadata"]
        key = meta["namespace"], meta["name"]
        self.drop(key, "job", meta["uid"])
        return key

    def take_child(self, body: Mapping[str, Any]) -> Key | None:
        """Take in a child Job; its QLoRAJob's key, None where it is no news.

        Raises:
            NotOwnedError: it is not controlled by the QLoRAJob that its labels name.

        """
        return self._take(observe_job, body, "children")

    def take_pod(self, body: Mapping[str, Any]) -> Key | None:
        """Take in a pod; its QLoRAJob's key, None where it is no news.

        Raises:
            NotOwnedError: no Job controls it. By which Job it is counted says :meth:`Known.owns`.

        """
        return self._take(observe_pod, body, "pods")

    def _take(
        self, see: Callable[[Mapping[str, Any]], ObservedJob | PodSnapshot], body: Mapping[str, Any], place: str
    ) -> Key | None:
        key = key_of_child(body)
        try:
            snapshot = see(body)
        except NotOwnedError:
            if key in self._known:
                getattr(self[key], place).pop(body["metadata"]["uid"], None)  # it was released
            raise
        known = self[key]
        if place == "pods" and known.job and known.job.is_finished and known.job.uid == snapshot.owner:
            known.pods.pop(snapshot.uid, None)  # nobody asks for them any more
            return None
        held: dict[str, Any] = getattr(known, place)
        before = held.get(snapshot.uid)
        if before and snapshot.version <= before.version:
            return None
        held[snapshot.uid] = snapshot
        if isinstance(snapshot, ObservedJob):
            known.made[snapshot.uid] = (snapshot.owner, snapshot.attempt)
            if before is None:
                known.pods_refused = ""  # said of an earlier attempt's
        is_own = isinstance(snapshot, ObservedJob) or known.owns(snapshot)
        return key if is_own and before != snapshot else None  # whatever their versions

    def drop_child(self, body: Mapping[str, Any]) -> Key:
        key = key_of_child(body)
        self[key].children.pop(body["metadata"]["uid"], None)
        self.forget(key)
        return key

    def drop_pod(self, body: Mapping[str, Any]) -> Key:
        """A pod is gone. While its job lives, its termination message are kept until :meth:`clear_gone`."""
        key = key_of_child(body)
        known = self[key]
        known.pods.pop(body["metadata"]["uid"], None)
        with suppress(NotOwnedError):
            pod = observe_pod(body)
            if known.owns(pod):
                known.pods[pod.uid] = replace(pod, gone=True)
        self.forget(key)
        return key

    def drop(self, key: Key, kind: str, uid: str) -> None:
        """Drop an object that is known to be gone: a ``job``, ``child`` or ``pod``."""
        known = self[key]
        if kind != "job":
            (known.children if kind == "child" else known.pods).pop(uid, None)
        elif known.job and known.job.uid == uid:
            before, known.job = known.job, None
            self._index_trial(key, before, None)
        self.forget(key)

    def clear_gone(self, key: Key, up_to_attempt: int) -> None:
        """Forget deleted pods of attempts that are closed."""
        known = self[key]
        known.pods = {u: p for u, p in known.pods.items() if not (p.gone and p.attempt <= up_to_attempt)}
        known.forget_made()


def _sweep_of(meta: Mapping[str, Any]) -> SweepRef | None:
    """Return the QLoRASweep that controls an object, by its owner reference."""
    owner = _controller(meta)
    is_sweep = owner and owner["kind"] == SWEEP_KIND and owner["apiVersion"].partition("/")[0] == GROUP
    return SweepRef(owner["name"], owner["uid"]) if owner and is_sweep else None


def _controller(meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((owner for owner in meta.get("ownerReferences") or () if owner.get("controller")), None)


def _is_finished(job: Mapping[str, Any]) -> bool:
    conditions = (job.get("status") or {}).get("conditions", ())
    return any(c["type"] in ("Succeeded", "Failed") and c["status"] == "True" for c in conditions)


def is_observed(body: Mapping[str, Any]) -> bool:
    """Return whether the status of a QLoRAJob or QLoRASweep is of its generation."""
    return bool(body["status"].get("observedGeneration") == body["metadata"].get("generation"))


def _is_kept(job: Mapping[str, Any]) -> bool:
    return job["spec"].get("policy", {}).get("ttlSecondsAfterFinished") is None


def key_of_child(body: Mapping[str, Any]) -> Key:
    meta = body["metadata"]
    return meta["namespace"], meta["labels"][JOB_LABEL]


def kept_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a QLoRAJob without what nobody here reads: labels, finalizers and managed fields can be megabytes."""
    meta = body["metadata"]
    labels = meta.get("labels") or {}
    owner = _controller(meta)
    kept_labels = {name: labels[name] for name in _KEPT_LABELS if name in labels}
    return {
        "apiVersion": body["apiVersion"],
        "kind": body["kind"],
        "metadata": {
            **{name: meta[name] for name in KEPT_META if name in meta},
            **({"labels": kept_labels} if kept_labels else {}),
            **({"ownerReferences": [{name: owner[name] for name in _KEPT_OWNER}]} if owner else {}),
        },
        "spec": body["spec"],
        **({"status": body["status"]} if body.get("status") else {}),
    }
