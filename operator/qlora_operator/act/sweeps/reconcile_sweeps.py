"""One QLoRASweep at a time: observe its trials, decide, change and create trials, write status, post Events.

All state is in the trials, so that the operator may end at any call: what a decision asks for is done in full before
status says so, and what was done already is found.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from datetime import datetime

from pydantic import ValidationError

from qlora_api.errors import FieldError
from qlora_api.sweep.check import sweep_errors
from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_api.sweep.sweep import QLoRASweep
from qlora_api.sweep.trials import TrialState
from qlora_operator.act.object_paths import sweep_path
from qlora_operator.act.post_event import post_event
from qlora_operator.act.sweeps.draws import DrawError, Draws
from qlora_operator.act.sweeps.sweep_status_writer import SweepStatusWriter
from qlora_operator.act.sweeps.trial_writer import NotATrialError, TrialWriter
from qlora_operator.act.work_queue import WorkQueue
from qlora_operator.config import OperatorConfig
from qlora_operator.decide.sweeps import sweep_status
from qlora_operator.decide.sweeps.sweep_plan import Trials, actions_of, budget_wake
from qlora_operator.decide.sweeps.sweep_status import SweepView
from qlora_operator.decide.sweeps.trial_state import ObservedTrial, observe_trial
from qlora_operator.kube.client import TRANSIENT, Api, ApiError, Object, retry_after
from qlora_operator.serve.metrics import Metrics
from qlora_operator.state.cache import Key, ObjectCache
from qlora_operator.state.sweep_cache import StoredSweep, SweepCache
from qlora_sweep.decide import Decision, Finish, Proceed, decide
from qlora_sweep.grid import UndrawnError, of_grid
from qlora_sweep.trial_jobs import trial_number

log = logging.getLogger(__name__)

REFUSED_SECONDS = 15.0
"""Delay before a request that the API server refused is tried again."""
QUIET_FAILURES = 2
"""So often a call may be refused for a passing reason before status says so."""


class SweepReconciler:
    """Carries out the decision for each sweep in its queue.

    Args:
        sweeps: all QLoRASweeps.
        jobs: all QLoRAJobs.
        api: the operator's calls.
        config: the operator's settings.
        metrics: told what happens.
        wake_job: told the key of each QLoRAJob that was created or changed.

    """

    def __init__(
        self,
        sweeps: SweepCache,
        jobs: ObjectCache,
        api: Api,
        config: OperatorConfig,
        metrics: Metrics,
        wake_job: Callable[[Key], None],
    ) -> None:
        self._sweeps, self._jobs, self._api, self._metrics = sweeps, jobs, api, metrics
        self.queue: WorkQueue[Key] = WorkQueue(metrics, retry_after, self._failed)
        self._trials, self._draws = TrialWriter(jobs, api, wake_job), Draws()
        self._status = SweepStatusWriter(sweeps, api, config.progress_seconds, self.queue.add_after)
        self._valid: dict[Key, str] = {}
        """UIDs of the sweeps that were found valid."""
        self._settled: dict[Key, dict[str, tuple[int, ObservedTrial]]] = {}
        """Version and trial, by UID, of each sweep's QLoRAJobs that do not run: they say the same at any time."""

    async def run(self, listed: asyncio.Event) -> None:
        """Reconcile the keys of the queue until cancelled, once everything was listed: what is not seen is no trial."""
        await listed.wait()
        await self.queue.run(self._reconcile)

    def _failed(self, key: Key, error: Exception, wait: float) -> None:
        name = "/".join(key)
        if isinstance(error, TRANSIENT) or (isinstance(error, ApiError) and error.is_transient):
            log.info("sweep %s: %s; again in %.1f s", name, error or type(error).__name__, wait)
        else:
            log.error("sweep %s: reconcile failed; again in %.1f s", name, wait, exc_info=error)
        reason = error.reason or str(error.status) if isinstance(error, ApiError) else type(error).__name__
        self._metrics.reconcile_failed(reason)

    async def _reconcile(self, key: Key) -> None:
        stored = self._sweeps.get(key)
        if stored is None or stored.is_quiescent:
            self._forget(key)
            return
        raw: Object = json.loads(stored.body)
        try:
            sweep, unknown = QLoRASweep.read(raw)
        except ValidationError as error:
            await self._status.write_unknown_fields(key, raw, error)
            return
        if sweep.metadata.deletion_timestamp is not None:
            return  # its trials go with it
        view = SweepView(sweep, self._api.clock.now().replace(microsecond=0), unknown)
        if sweep_status.is_finished(view.before):
            await self._finished(key, view, raw)
        elif errors := await self._errors(key, stored, sweep.spec):
            await self._write(key, view, raw, sweep_status.invalid(view, errors))
        else:
            await self._search(key, view, raw)

    async def _search(self, key: Key, view: SweepView, raw: Object) -> None:
        """Do what follows from the trials, and say so."""
        sweep, trials = view.sweep, self._observe(key, view.sweep, view.now)
        decision: Decision = Proceed(())
        refused = ""
        try:
            decision = await self._decide(sweep.spec, trials)
            await self._trials.do(key, actions_of(sweep, trials, decision))
        except (ApiError, DrawError) as error:
            if self._is_passing(key, error):
                raise
            refused = error.message if isinstance(error, ApiError) else str(error)
            self.queue.add_after(key, REFUSED_SECONDS)
        trials = self._observe(key, sweep, view.now)
        await self._write(key, view, raw, sweep_status.status_of(view, trials, decision, refused))
        wake = None if isinstance(decision, Finish) else budget_wake(sweep.spec, trials)
        if wake is not None:
            self.queue.add_after(key, wake)

    def _is_passing(self, key: Key, error: ApiError | DrawError) -> bool:
        """Return whether the same may go through a moment later, so that status need not speak of it."""
        if isinstance(error, (DrawError, NotATrialError)):
            return False
        return error.status == 404 or (error.is_transient and self.queue.failures(key) < QUIET_FAILURES)

    async def _decide(self, spec: QLoRASweepSpec, trials: Trials) -> Decision:
        known = [each.trial for _, each in sorted(trials.items())]
        try:
            return decide(spec, known, of_grid, suspended=spec.suspend)
        except UndrawnError:
            drawn = await self._draws.draw(spec, known)
            return decide(spec, known, lambda _spec, number, _earlier: drawn[number], suspended=spec.suspend)

    def _observe(self, key: Key, sweep: QLoRASweep, now: datetime) -> dict[int, ObservedTrial]:
        """Return the QLoRAJobs that the sweep controls, under names of its trials."""
        before = self._settled.get(key, {})
        found: dict[int, ObservedTrial] = {}
        settled: dict[str, tuple[int, ObservedTrial]] = {}
        for name, job in self._jobs.trials_of(sweep.metadata.uid or ""):
            number = trial_number(sweep.metadata.name, name)
            if number is None:
                continue
            version, trial = before.get(job.uid, (0, None))
            if trial is None or version != job.version:
                trial = observe_trial(number, job.parse()[0], sweep.spec, now)
            found[number] = trial
            if trial.trial.state is not TrialState.RUNNING:
                settled[job.uid] = job.version, trial
        self._settled[key] = settled
        return found

    async def _errors(self, key: Key, stored: StoredSweep, spec: QLoRASweepSpec) -> list[FieldError]:
        """Return what keeps a sweep without trials from being run: what no schema can say.

        Of a sweep that has trials, nothing has changed since but limits.
        """
        if self._valid.get(key) == stored.uid or self._jobs.trials_of(stored.uid):
            return []
        errors = await asyncio.to_thread(sweep_errors, spec)  # takes up to half a second
        if not errors:
            self._valid[key] = stored.uid
        return errors

    async def _finished(self, key: Key, view: SweepView, raw: Object) -> None:
        """Delete a sweep that is over when its time has come."""
        await self._status.write(key, view.sweep, raw, sweep_status.observed(view))
        ttl, ended = view.sweep.spec.ttl_seconds_after_finished, view.before.completion_time
        if ttl is None or ended is None:
            return
        left = ttl - (view.now - ended).total_seconds()
        if left > 0:
            self.queue.add_after(key, left)
            return
        await self._api.delete(sweep_path(key), view.sweep.metadata.uid)

    async def _write(self, key: Key, view: SweepView, raw: Object, status: QLoRASweepStatus) -> None:
        """Write status, and post what has happened once it says so; look again when the time to live is over."""
        ttl = view.sweep.spec.ttl_seconds_after_finished
        if ttl is not None and sweep_status.is_finished(status):
            self.queue.add_after(key, ttl)
        if await self._status.write(key, view.sweep, raw, status):
            for note in sweep_status.transitions(view.before, status):
                await post_event(self._api, view.sweep, note)

    def _forget(self, key: Key) -> None:
        """Forget what is only known of a sweep that goes on."""
        self._status.forget(key)
        self._valid.pop(key, None)
        self._settled.pop(key, None)
