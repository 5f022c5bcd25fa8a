"""What the operator knows, kept small: per QLoRAJob a few kilobytes of JSON, per child a frozen value.

Filled by watches and by the answers to the operator's own writes; of two views of one object the newer one counts, so a
decision never falls behind what this process itself has done.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from qlora_api.contract import ProgressReport
from qlora_api.job import QLoRAJob
from qlora_operator.names import JOB_LABEL
from qlora_operator.seen import SeenJob, SeenPod, see_job, see_pod

log = logging.getLogger(__name__)

S = TypeVar("S", SeenJob, SeenPod)
Key = tuple[str, str]
"""Namespace and name of a QLoRAJob."""
_KEPT_META = ("name", "namespace", "uid", "generation", "resourceVersion", "creationTimestamp", "deletionTimestamp")


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A QLoRAJob without what nobody here reads."""

    uid: str
    version: int
    body: bytes
    over: bool
    """It succeeded or failed."""
    rests: bool
    """It is over, and does not go by itself."""

    def parse(self) -> QLoRAJob:
        """Raises pydantic's ValidationError where the API server took what this version of the types refuses."""
        return QLoRAJob.model_validate_json(self.body)


@dataclass
class Known:
    """All that is known around one QLoRAJob."""

    job: StoredJob | None = None
    children: dict[str, SeenJob] = field(default_factory=dict)
    """By UID."""
    pods: dict[str, SeenPod] = field(default_factory=dict)
    """By UID."""
    report: ProgressReport | None = None
    pods_refused: str = ""
    deleted: frozenset[str] = frozenset()
    """UIDs of what this process has had deleted. A watch says so later, maybe after one that wakes the job."""


class Store:
    """Everything known, by QLoRAJob."""

    def __init__(self) -> None:
        self._known: dict[Key, Known] = {}

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
        child, text = event["involvedObject"], event.get("message", "")
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
            known.report, known.pods_refused = None, ""
        over = _is_over(body)
        kept = {
            "apiVersion": body["apiVersion"],
            "kind": body["kind"],
            "metadata": {name: meta[name] for name in _KEPT_META if name in meta},
            "spec": body["spec"],
            **({"status": body["status"]} if body.get("status") else {}),
        }
        rests = over and body["spec"].get("policy", {}).get("ttlSecondsAfterFinished") is None
        text = json.dumps(kept, separators=(",", ":")).encode()
        known.job = StoredJob(meta["uid"], version, text, over, rests)
        return key

    def drop_job(self, body: Mapping[str, Any]) -> Key:
        meta = body["metadata"]
        key = meta["namespace"], meta["name"]
        self.drop(key, "job", meta["uid"])
        return key

    def take_child(self, body: Mapping[str, Any]) -> Key | None:
        """Take in a child Job; its QLoRAJob's key, None where it is no news."""
        return self._take(_see(see_job, body), body, "children")

    def take_pod(self, body: Mapping[str, Any]) -> Key | None:
        """Take in a pod; its QLoRAJob's key, None where it is no news."""
        return self._take(_see(see_pod, body), body, "pods")

    def _take(self, seen: SeenJob | SeenPod | None, body: Mapping[str, Any], place: str) -> Key | None:
        if seen is None:
            return None
        key = key_of_child(body)
        known = self[key]
        if place == "pods" and known.job and known.job.over and known.job.uid == seen.owner:
            known.pods.pop(seen.uid, None)  # nobody asks for them any more
            return None
        held: dict[str, Any] = getattr(known, place)
        before = held.get(seen.uid)
        if before and seen.version <= before.version:
            return None
        held[seen.uid] = seen
        if before is None and place == "children":
            self[key].pods_refused = ""  # said of an earlier attempt's
        return None if before == seen else key  # whatever their versions

    def drop_child(self, body: Mapping[str, Any]) -> Key:
        key = key_of_child(body)
        self[key].children.pop(body["metadata"]["uid"], None)
        self.forget(key)
        return key

    def drop_pod(self, body: Mapping[str, Any]) -> Key:
        """A pod is gone. While its job lives, its last words are kept until :meth:`clear_gone`."""
        key = key_of_child(body)
        known = self[key]
        pod = _see(see_pod, body)
        if pod and known.job and known.job.uid == pod.owner:
            known.pods[pod.uid] = replace(pod, gone=True)
        else:
            known.pods.pop(body["metadata"]["uid"], None)
        self.forget(key)
        return key

    def drop(self, key: Key, kind: str, uid: str) -> None:
        """Drop an object that is known to be gone: a ``job``, ``child`` or ``pod``."""
        known = self[key]
        if kind != "job":
            (known.children if kind == "child" else known.pods).pop(uid, None)
        elif known.job and known.job.uid == uid:
            known.job = None
        self.forget(key)

    def clear_gone(self, key: Key, up_to_attempt: int) -> None:
        """Forget deleted pods of attempts that are concluded."""
        known = self[key]
        known.pods = {u: p for u, p in known.pods.items() if not (p.gone and p.attempt <= up_to_attempt)}


def _is_over(job: Mapping[str, Any]) -> bool:
    conditions = (job.get("status") or {}).get("conditions", ())
    return any(c["type"] in ("Succeeded", "Failed") and c["status"] == "True" for c in conditions)


def key_of_child(body: Mapping[str, Any]) -> Key:
    meta = body["metadata"]
    return meta["namespace"], meta["labels"][JOB_LABEL]


def _see(cut: Callable[[Mapping[str, Any]], S], body: Mapping[str, Any]) -> S | None:
    """None for what somebody else gave the operator's labels, with values that are not the operator's."""
    try:
        return cut(body)
    except (KeyError, ValueError) as error:
        meta = body["metadata"]
        log.warning(
            "%s/%s has the operator's labels and is not of its making: %s", meta["namespace"], meta["name"], error
        )
        return None
