"""One QLoRAJob at a time: observe, plan, apply, write status once.

A key that is woken while it is reconciled is reconciled once more; one that fails is tried again later and later.
Nothing else in the operator writes to the API server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from pydantic import ValidationError

from qlora_api.errors import ManifestError
from qlora_api.job import GROUP, VERSION, QLoRAJob
from qlora_api.spec import Gang
from qlora_api.status import QLoRAJobStatus
from qlora_operator.act.children import UNREAD, collection_of, with_new_key
from qlora_operator.act.correction_store import Corrections
from qlora_operator.act.gang_scheduling import cannot_start, choose_gang
from qlora_operator.act.merge_patch import merge_patch
from qlora_operator.act.nodes import Nodes
from qlora_operator.config import OperatorConfig
from qlora_operator.decide.attempt_history import REPORTED_FIELDS, differ_in_figures, with_job_uids
from qlora_operator.decide.decision import Decision, Note
from qlora_operator.decide.events import event_of
from qlora_operator.decide.plan import is_finished, plan
from qlora_operator.kube.client import TRANSIENT, Api, ApiError, Object
from qlora_operator.names import SERVICE
from qlora_operator.serve.metrics import Metrics
from qlora_operator.state.cache import Key, Known, ObjectCache
from qlora_operator.state.observed import PREPARE, JobState, Observed, ObservedJob, PodSnapshot
from qlora_operator.state.ownership import is_same_object
from qlora_operator.supervisor import backoff

log = logging.getLogger(__name__)

WORKERS = 8
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 60.0
QUIET_FAILURES = 2
"""So often a child may fail to be made for a passing reason before status says so."""


class Reconciler:
    """Wakes keys, and does for each what the plan says.

    Args:
        store: what is known.
        api: the operator's calls.
        config: the operator's settings.
        gangs: what the cluster offers, told anew each time it is asked.
        corrections: what is learned of predicted memory.
        metrics: told what happens.

    """

    def __init__(
        self,
        store: ObjectCache,
        api: Api,
        config: OperatorConfig,
        gangs: Callable[[], frozenset[Gang]],
        corrections: Corrections,
        metrics: Metrics,
    ) -> None:
        self._store, self._api, self._config, self._gangs, self._metrics = store, api, config, gangs, metrics
        self._corrections = corrections
        self._queue: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: dict[Key, float] = {}
        self._busy: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._wrote: dict[Key, float] = {}
        self._nodes = Nodes(api)
        self._not_before: dict[Key, float] = {}
        self._unread: defaultdict[Key, set[str]] = defaultdict(set)
        self._service_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.services: set[str] = set()
        """Namespaces that have the shared Service. What deletes it unasked is told by its watch."""
        self.polled: dict[Key, PodSnapshot] = {}
        """Rank 0's pods of the jobs that train."""

    def wake(self, key: Key) -> None:
        """Reconcile a key as soon as possible, but not before the time that the API server asked for."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        left = self._not_before.get(key, 0.0) - time.monotonic()
        if left > 0:
            self.wake_later(key, left)
            return
        self._not_before.pop(key, None)
        if key not in self._queued:
            self._queued[key] = time.monotonic()
            if key not in self._busy:
                self._queue.put_nowait(key)

    def wake_later(self, key: Key, seconds: float) -> None:
        """Reconcile a key after a while; the earliest of several whiles counts."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer and timer.when() <= loop.time() + seconds:
            return
        if timer:
            timer.cancel()
        self._timers[key] = loop.call_later(max(seconds, 0.01), self.wake, key)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            self._metrics.waited(time.monotonic() - self._queued.pop(key))
            self._busy.add(key)
            started = time.monotonic()
            try:
                await self._reconcile(key)
                self._failures.pop(key, None)
            except Exception as error:  # noqa: BLE001 one job's trouble must not stop the others'
                self._failed(key, error)
            except asyncio.CancelledError:
                self._queued.setdefault(key, started)  # whoever works on takes it up again
                raise
            finally:
                self._metrics.reconciled(time.monotonic() - started)
                self._busy.discard(key)
                if key in self._queued:
                    self._queue.put_nowait(key)

    def _failed(self, key: Key, error: Exception) -> None:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        wait = backoff(failures, FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)
        name = "/".join(key)
        if isinstance(error, ApiError) and error.is_transient:
            if error.retry_after:
                wait = max(wait, error.retry_after)
                self._not_before[key] = time.monotonic() + error.retry_after
            log.info("%s: %s; again in %.1f s", name, error, wait)
            kind = error.reason or str(error.status)
        elif isinstance(error, TRANSIENT):
            log.warning("%s: no answer from the API server (%s); again in %.1f s", name, type(error).__name__, wait)
            kind = "NoAnswer"
        else:
            log.error("%s: reconcile failed; again in %.1f s", name, wait, exc_info=error)
            kind = type(error).__name__
        self._metrics.reconcile_failed(kind)
        self.wake_later(key, wait)

    # ------------------------------------------------------------------------------------------------------------ a job

    async def _reconcile(self, key: Key) -> None:
        known = self._store[key]
        stored = known.job
        if stored is None:
            self.polled.pop(key, None)
            self._wrote.pop(key, None)
            self._unread.pop(key, None)
            self._store.forget(key)
            await self._clear_service(key[0])
            return
        if stored.uid in known.deleted:
            return
        if stored.is_quiescent and not any(_runs(child) for child in known.own_children()):
            self._leave(key, known)
            return
        raw = json.loads(stored.body)
        try:
            job = stored.parse()
        except (ValidationError, ManifestError) as error:
            await self._refuse(key, raw, error)
            return
        decided, passing = await self._decide(key, known, job)
        if not await self._clear(key, known, job, decided.delete):
            return
        await self._write_status(key, job, raw, decided)
        if is_finished(decided.status) and not (job.status and is_finished(job.status)):
            await self._corrections.take(job.spec, decided.status)
        for note in decided.notes:
            await self._post(job, note)
        self._afterwards(key, known, job, decided)
        if decided.delete_self and await self._is_as_decided(key, job):
            await self._delete(known, _path(key), stored.uid)
        if passing:
            raise passing

    async def _decide(self, key: Key, known: Known, job: QLoRAJob) -> tuple[Decision, ApiError | None]:
        """Decide, and make what is to be made; a refusal goes into status, and is returned if it may pass."""
        seen = await self._observe(known)
        gang = choose_gang(job.spec.scheduling, self._config.gang, self._gangs())
        refused, correction = cannot_start(job.spec.scheduling, gang, self._gangs()), self._corrections.of(job.spec)
        seen = replace(seen, child_refused=refused, memory_correction=correction)
        decided = self._plan(key, job, seen, gang)
        try:
            await self._make(key, decided)
        except ApiError as error:
            if error.is_transient and self._failures.get(key, 0) < QUIET_FAILURES:
                raise
            waiting = self._plan(key, job, replace(seen, child_refused=error.message), gang)
            return waiting, error if error.is_transient else None
        return decided, None

    def _plan(self, key: Key, job: QLoRAJob, seen: Observed, gang: Gang) -> Decision:
        """Decide; without what pods say of themselves, where that cannot be dealt with."""
        try:
            return plan(job, seen, self._config, gang)
        except Exception as error:
            log.exception("%s: nothing can be decided on what its pods say; it is left out", "/".join(key))
            self._metrics.reconcile_failed(type(error).__name__)
            return plan(job, seen.without_reports(), self._config, gang)

    def _afterwards(self, key: Key, known: Known, job: QLoRAJob, decided: Decision) -> None:
        before, after = job.status or QLoRAJobStatus(), decided.status
        ended = {a.number for a in before.attempts if a.end_time}
        for attempt in after.attempts:
            if attempt.end_time and attempt.number not in ended and attempt.reason:
                self._metrics.attempt_ended(attempt.reason.value)
        prepared = PREPARE if after.prepared or after.attempts or is_finished(after) else PREPARE - 1
        concluded = max((a.number for a in after.attempts if a.end_time), default=prepared)
        if any(p.gone for p in known.pods.values()):
            self._store.clear_gone(key, concluded)
        if decided.watch_progress:
            first = next((p for p in known.own_pods() if _is_first(p, after.attempts[-1].number)), None)
            if first:
                self.polled[key] = first
            else:
                self.polled.pop(key, None)
        else:
            self.polled.pop(key, None)
            known.report = None
        if decided.wake_after is not None:
            self.wake_later(key, decided.wake_after)

    def _leave(self, key: Key, known: Known) -> None:
        """Keep of a job that is over no more than a restart would find."""
        self.polled.pop(key, None)
        self._wrote.pop(key, None)
        self._unread.pop(key, None)
        known.report = None
        known.pods = {uid: pod for uid, pod in known.pods.items() if known.job and pod.owner != known.job.uid}

    async def _observe(self, known: Known) -> Observed:
        jobs: dict[int, ObservedJob] = {}
        for child in known.own_children():
            if child.attempt not in jobs or jobs[child.attempt].deleting:
                jobs[child.attempt] = child
        pods = known.own_pods()
        stuck = {p.node for p in pods if p.deletion_due and not p.ended and p.disruption and p.node}
        lost = [node for node in stuck if await self._nodes.is_lost(node)]
        return Observed(
            now=datetime.now(UTC).replace(microsecond=0),
            jobs=jobs,
            pods=pods,
            report=known.report,
            lost_nodes=frozenset(lost),
            pods_refused=known.pods_refused,
        )

    # ----------------------------------------------------------------------------------------------------------- writes

    async def _make(self, key: Key, decided: Decision) -> None:
        for body in decided.make:
            if body["kind"] == "Service":
                async with self._service_locks[key[0]]:
                    if key[0] not in self.services:
                        await self._create(key, body)
                        self.services.add(key[0])
                continue
            if body["kind"] in UNREAD:
                await self._create_unread(key, body)
                continue
            made = await self._create(key, body)
            if made["kind"] == "Job":
                self._store.take_child(made)

    async def _create(self, key: Key, body: Object) -> Object:
        collection = collection_of(body, key[0])
        try:
            return await self._api.create(collection, body)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            return await self._mine(collection, body)

    async def _create_unread(self, key: Key, body: Object) -> None:
        """Create what the operator may create and not read. Its name has the job's UID: what is there is the job's."""
        name, created = body["metadata"]["name"], self._unread[key]
        if name in created:
            return
        try:
            await self._api.create(collection_of(body, key[0]), with_new_key(body))
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        created.add(name)

    async def _clear(self, key: Key, known: Known, job: QLoRAJob, children: Sequence[ObservedJob]) -> bool:
        """Delete children; whether the decision may be carried out further."""
        children = [child for child in children if child.uid not in known.deleted]
        if children and not await self._is_as_decided(key, job):
            return False
        for child in children:
            await self._delete(known, f"/apis/batch/v1/namespaces/{key[0]}/jobs/{child.name}", child.uid)
        return True

    async def _is_as_decided(self, key: Key, job: QLoRAJob) -> bool:
        """Return whether a job is still as it was when decided on; if it has changed, it is decided on anew.

        Of two operators for a moment, one that has not seen yet that a job was resumed would delete what the other
        one made.
        """
        try:
            there = await self._api.get(_path(key))
        except ApiError as error:
            if error.status != 404:
                raise
            self.wake_later(key, LONGEST_RETRY_SECONDS)  # the watch will say so before, unless nothing was served
            return False
        if there["metadata"]["resourceVersion"] == job.metadata.resource_version:
            return True
        self._store.take_job(there)
        self.wake(key)
        return False

    async def _delete(self, known: Known, path: str, uid: str) -> None:
        if await self._api.delete(path, uid):
            known.deleted |= {uid}

    async def _mine(self, collection: str, body: Object) -> Object:
        """Return the object under the name if it is this job's, and not of an earlier job of the same name."""
        name = body["metadata"]["name"]
        there = await self._api.get(f"{collection}/{name}")
        if not is_same_object(body, there):
            text = (
                f'a {body["kind"]} named "{name}" is there that is not this job\'s; it is waited for until it is gone'
            )
            raise ApiError(409, "Conflict", f"{text}: delete it, or give the job another name")
        there.setdefault("kind", body["kind"])
        return there

    async def _write_status(self, key: Key, job: QLoRAJob, raw: Object, decided: Decision) -> None:
        before: Object = raw.get("status") or {}
        decided = replace(decided, status=with_job_uids(decided.status, self._store[key].own_children()))
        after = decided.status.to_json_dict()
        patch = merge_patch(before, after) if job.status is not None else after
        if not patch:
            return
        if job.status is not None and differ_in_figures(job.status, decided.status):
            left = self._wrote.get(key, 0.0) + self._config.progress_seconds - time.monotonic()
            if left > 0:
                self.wake_later(key, left)
                return
        body = {"metadata": {"resourceVersion": job.metadata.resource_version}, "status": patch}
        try:
            written = await self._patch_status(key, body)
        except ApiError as error:
            if error.status == 404:  # deleted meanwhile; the watch will say so
                return
            if error.status == 409:  # somebody changed the job: decide again on what it is now
                self._store.take_job(await self._api.get(_path(key)))
            raise
        self._wrote[key] = time.monotonic()
        self._store.take_job(written)

    async def _patch_status(self, key: Key, body: Object) -> Object:
        """Write status; without the figures that pods tell of, where the API server refuses it with them."""
        try:
            return await self._api.patch(f"{_path(key)}/status", body)
        except ApiError as error:
            told = {name: value for name, value in body["status"].items() if name not in REPORTED_FIELDS}
            if error.status != 422 or told == body["status"]:
                raise
            log.warning("%s: status is refused with the figures of its pods: %s", "/".join(key), error)
            return await self._api.patch(f"{_path(key)}/status", {**body, "status": told})

    async def _refuse(self, key: Key, raw: Object, error: Exception) -> None:
        """Say that this operator does not understand a job that the API server took."""
        now = datetime.now(UTC).replace(microsecond=0).isoformat()
        text = str(error)[:2000]
        failed = {
            "type": "Failed",
            "status": "True",
            "reason": "UserError",
            "message": text,
            "lastTransitionTime": now,
            "observedGeneration": raw["metadata"].get("generation", 0),
        }
        before: Object = next((c for c in (raw.get("status") or {}).get("conditions", ()) if c["type"] == "Failed"), {})
        if before.get("message") == text:
            return
        with_spec_alone = {name: value for name, value in raw.items() if name != "status"}
        try:
            QLoRAJob.model_validate_json(json.dumps(with_spec_alone))
        except (ValidationError, ManifestError):
            pass
        else:  # what a newer operator wrote is no reason to end a job: leave it alone until this one is newer, too
            raise RuntimeError(f"status cannot be understood: {text}")
        status = {"state": "Failed", "reason": "UserError", "completionTime": now, "conditions": [failed]}
        body = {"metadata": {"resourceVersion": raw["metadata"]["resourceVersion"]}, "status": status}
        self._store.take_job(await self._api.patch(f"{_path(key)}/status", body))

    async def _post(self, job: QLoRAJob, note: Note) -> None:
        """Post an Event. Losing one loses nothing that status does not say."""
        path = f"/apis/events.k8s.io/v1/namespaces/{job.metadata.namespace}/events"
        try:
            await self._api.create(path, event_of(job, note, datetime.now(UTC)))
        except (ApiError, *TRANSIENT) as error:
            log.info("%s/%s: an event is lost: %s", job.metadata.namespace, job.metadata.name, error)

    async def _clear_service(self, namespace: str) -> None:
        """Delete the shared Service with the last job of its namespace, and not while another job makes sure of it."""
        if namespace not in self.services:
            return
        async with self._service_locks[namespace]:
            if any(key[0] == namespace and known.job for key, known in self._store):
                return
            await self._api.delete(f"/api/v1/namespaces/{namespace}/services/{SERVICE}")
            self.services.discard(namespace)


def _runs(child: ObservedJob) -> bool:
    return not child.deleting and child.state not in (JobState.COMPLETE, JobState.FAILED)


def _is_first(pod: PodSnapshot, attempt: int) -> bool:
    return pod.attempt == attempt and pod.index == 0 and bool(pod.ip) and not pod.gone


def _path(key: Key) -> str:
    return f"/apis/{GROUP}/{VERSION}/namespaces/{key[0]}/qlorajobs/{key[1]}"
