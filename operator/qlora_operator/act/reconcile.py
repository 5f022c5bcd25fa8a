"""One QLoRAJob at a time: observe, decide, create children, delete children, write status, post Events.

To decide touches nothing (``decide/plan.py``). A child that the API server refuses is one more observation, with which
the job is decided on once more. Nothing else in the operator writes to the API server, but for what it has learned of
memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from pydantic import ValidationError

from qlora_api.errors import ManifestError
from qlora_api.job import QLoRAJob
from qlora_api.spec import Gang
from qlora_api.status import QLoRAJobStatus
from qlora_operator.act.children import Children
from qlora_operator.act.contested_jobs import ContestedJobs
from qlora_operator.act.correction_store import Corrections
from qlora_operator.act.lost_nodes import LostNodes
from qlora_operator.act.object_paths import job_path
from qlora_operator.act.post_event import post_event
from qlora_operator.act.status_writer import StatusWriter
from qlora_operator.act.work_queue import LONGEST_RETRY_SECONDS, WorkQueue
from qlora_operator.config import OperatorConfig
from qlora_operator.decide.conditions import is_finished
from qlora_operator.decide.decision import Decision
from qlora_operator.decide.gang import cannot_start, choose_gang
from qlora_operator.decide.plan import plan
from qlora_operator.kube.client import TRANSIENT, Api, ApiError, Object, retry_after
from qlora_operator.serve.metrics import Metrics
from qlora_operator.state.cache import Key, Known, ObjectCache
from qlora_operator.state.observed import PREPARE, JobState, Observed, ObservedJob, PodSnapshot

log = logging.getLogger(__name__)

QUIET_FAILURES = 2
"""Number of refusals of a child for a transient reason before status says so."""


class Reconciler:
    """Carries out the plan for each job in its queue.

    Args:
        cache: what is known.
        api: the operator's calls.
        config: the operator's settings.
        gangs: returns what the cluster offers now.
        corrections: what is learned of predicted memory.
        metrics: told what happens.

    """

    def __init__(
        self,
        cache: ObjectCache,
        api: Api,
        config: OperatorConfig,
        gangs: Callable[[], frozenset[Gang]],
        corrections: Corrections,
        metrics: Metrics,
    ) -> None:
        self._cache, self._api, self._config, self._gangs, self._metrics = cache, api, config, gangs, metrics
        self._corrections = corrections
        self.queue: WorkQueue[Key] = WorkQueue(metrics, retry_after, self._failed)
        self.children = Children(cache, api)
        self._status = StatusWriter(cache, api, config.progress_seconds, self.queue.add_after)
        self._lost_nodes = LostNodes(api)
        self.polled: dict[Key, PodSnapshot] = {}
        """Rank 0's pods of the jobs that train, and the pods of Prepare that work."""
        self._inherited: frozenset[str] = frozenset()
        self._contested = ContestedJobs(metrics)

    def begin(self) -> None:
        """Take note of what other releases of the operator had made before this process began."""
        children = (child for _, known in self._cache for child in known.own_children())
        self._inherited = frozenset(c.uid for c in children if c.operator not in ("", self._config.release))

    async def run(self) -> None:
        """Reconcile the keys of the queue until cancelled."""
        await self.queue.run(self._reconcile)

    def _failed(self, key: Key, error: Exception, wait: float) -> None:
        name = "/".join(key)
        if isinstance(error, ApiError) and error.is_transient:
            log.info("%s: %s; again in %.1f s", name, error, wait)
            kind = error.reason or str(error.status)
        elif isinstance(error, TRANSIENT):
            log.warning("%s: no answer from the API server (%s); again in %.1f s", name, type(error).__name__, wait)
            kind = "NoAnswer"
        else:
            log.error("%s: reconcile failed; again in %.1f s", name, wait, exc_info=error)
            kind = type(error).__name__
        self._metrics.reconcile_failed(kind)

    async def _reconcile(self, key: Key) -> None:
        known = self._cache[key]
        stored = known.job
        if stored is None:
            await self._forget_deleted(key)
            return
        if stored.uid in known.deleted:  # the watch has not reported it yet
            return
        if stored.is_quiescent and not any(_runs(child) for child in known.own_children()):
            self._forget(key)
            _keep_what_a_restart_finds(known)
            return
        raw = json.loads(stored.body)
        try:
            job, unknown = stored.parse()
        except (ValidationError, ManifestError) as error:
            await self._status.write_unknown_fields(key, raw, error)
            return
        gang = choose_gang(job.spec.scheduling, self._config.gang, self._gangs())
        observed = replace(await self._observe(known, job, gang), unknown_fields=unknown)
        await self._decide_and_act(key, known, job, raw, observed, gang)

    async def _decide_and_act(
        self, key: Key, known: Known, job: QLoRAJob, raw: Object, observed: Observed, gang: Gang
    ) -> None:
        """Decide, and carry out the decision in this order: create, delete, write status, all else.

        Raises:
            ApiError: the API server refuses a child for a reason that may pass; all else is done.

        """
        decision = self._plan(key, job, observed, gang)
        refusal = await self._create_children(key, decision)
        if refusal:
            decision = self._plan(key, job, replace(observed, create_error=refusal.message), gang)
        if not await self._delete_children(key, known, job, decision.delete):
            return
        if await self._status.write(key, job, raw, decision):
            await self._follow_up(key, known, job, decision)
        if decision.wake_after is not None:
            self.queue.add_after(key, decision.wake_after)
        if refusal and refusal.is_transient:
            raise refusal

    async def _follow_up(self, key: Key, known: Known, job: QLoRAJob, decision: Decision) -> None:
        """Do what follows once status says what was decided: learn, post Events, record, delete the job."""
        if is_finished(decision.status) and not (job.status and is_finished(job.status)):
            await self._corrections.take(job.spec, decision.status)
        for note in (*decision.notes, *self._contested.take(key, decision.contested)):
            await post_event(self._api, job, note)
        self._record(key, known, job, decision)
        if decision.delete_self and await self._is_as_decided(key, job):
            await self.children.delete_once(known, job_path(key), job.metadata.uid or "")

    # ---------------------------------------------------------------------------------------------- observe and decide

    async def _observe(self, known: Known, job: QLoRAJob, gang: Gang) -> Observed:
        jobs: dict[int, ObservedJob] = {}
        for child in known.own_children():
            if child.attempt not in jobs or jobs[child.attempt].deleting:
                jobs[child.attempt] = child
        pods = known.own_pods()
        stuck = {p.node for p in pods if p.deletion_due and not p.ended and p.disruption and p.node}
        lost = [node for node in stuck if await self._lost_nodes.is_lost(node)]
        return Observed(
            now=self._api.clock.now().replace(microsecond=0),
            jobs=jobs,
            pods=pods,
            report=known.report,
            stage_start=known.stage_start,
            lost_nodes=frozenset(lost),
            pods_refused=known.pods_refused,
            create_error=cannot_start(job.spec.scheduling, gang, self._gangs()),
            memory_correction=self._corrections.of(job.spec),
            inherited=self._inherited,
        )

    def _plan(self, key: Key, job: QLoRAJob, observed: Observed, gang: Gang) -> Decision:
        """Decide; without what pods say of themselves, where that cannot be dealt with."""
        try:
            return plan(job, observed, self._config, gang)
        except Exception as error:
            log.exception(
                "%s: no decision is possible with the reports of its pods; deciding without them", "/".join(key)
            )
            self._metrics.reconcile_failed(type(error).__name__)
            return plan(job, observed.without_reports(), self._config, gang)

    # ------------------------------------------------------------------------------------------------------------ apply

    async def _create_children(self, key: Key, decision: Decision) -> ApiError | None:
        """Create what a decision asks for; return why the API server refuses it.

        Raises:
            ApiError: it was refused for a reason that may have passed before status says so.

        """
        try:
            if await self.children.create(key, decision.create):
                self.queue.add(key)
        except ApiError as error:
            if error.is_transient and self.queue.failures(key) < QUIET_FAILURES:
                raise
            return error
        return None

    async def _delete_children(self, key: Key, known: Known, job: QLoRAJob, children: Sequence[ObservedJob]) -> bool:
        """Delete child Jobs; return whether the decision still holds."""
        children = [child for child in children if child.uid not in known.deleted]
        if children and not await self._is_as_decided(key, job):
            return False
        await self.children.delete(key, known, children)
        return True

    async def _is_as_decided(self, key: Key, job: QLoRAJob) -> bool:
        """Return whether a job has not changed since the decision; if it has, it is queued again.

        While two operators run, one that has not yet observed that a job was resumed would otherwise delete the Jobs
        that the other one created.
        """
        try:
            there = await self._api.get(job_path(key))
        except ApiError as error:
            if error.status != 404:
                raise
            self.queue.add_after(key, LONGEST_RETRY_SECONDS)  # the watch says so before, unless nothing was served
            return False
        if there["metadata"]["resourceVersion"] == job.metadata.resource_version:
            return True
        self._cache.take_job(there)
        self.queue.add(key)
        return False

    # ---------------------------------------------------------------------------------------------------- what is known

    def _record(self, key: Key, known: Known, job: QLoRAJob, decision: Decision) -> None:
        """Record a decision that was carried out: count ends, poll the first rank or not, forget pods."""
        before, after = job.status or QLoRAJobStatus(), decision.status
        ended = {a.number for a in before.attempts if a.end_time}
        for attempt in after.attempts:
            if attempt.end_time and attempt.number not in ended and attempt.reason:
                self._metrics.attempt_ended(attempt.reason.value)
        prepared = PREPARE if after.prepared or after.attempts or is_finished(after) else PREPARE - 1
        closed = max((a.number for a in after.attempts if a.end_time), default=prepared)
        if any(p.gone for p in known.pods.values()):
            self._cache.clear_gone(key, closed)
        self.polled.pop(key, None)
        asked = after.attempts[-1].number if after.attempts else PREPARE
        if not decision.watch_progress:
            known.forget_report()
        elif first := next((p for p in known.own_pods() if _is_first(p, asked)), None):
            self.polled[key] = first

    async def _forget_deleted(self, key: Key) -> None:
        self._forget(key)
        self._cache.forget(key)
        await self.children.delete_unused_service(key[0])

    def _forget(self, key: Key) -> None:
        """Forget what is only kept for a job that is not finished."""
        self.polled.pop(key, None)
        self._status.forget(key)
        self._contested.forget(key)
        self.children.forget(key)


def _keep_what_a_restart_finds(known: Known) -> None:
    """Forget what a new process would not find of a job that is over: the last report, and its pods."""
    known.forget_report()
    known.pods = {uid: pod for uid, pod in known.pods.items() if known.job and pod.owner != known.job.uid}


def _runs(child: ObservedJob) -> bool:
    return not child.deleting and child.state not in (JobState.COMPLETE, JobState.FAILED)


def _is_first(pod: PodSnapshot, attempt: int) -> bool:
    return pod.attempt == attempt and pod.index == 0 and bool(pod.ip) and not pod.gone
