"""The operator: all parts, put together."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from qlora_api.errors import ManifestError
from qlora_api.spec import Gang
from qlora_operator.act.correction_store import Corrections
from qlora_operator.act.gang_scheduling import discover_gangs
from qlora_operator.act.leader_election import LeaderElection
from qlora_operator.act.reconcile import Reconciler
from qlora_operator.act.sweeps.reconcile_sweeps import SweepReconciler
from qlora_operator.config import OperatorConfig
from qlora_operator.kube.authentication import cluster_identity, load_credentials
from qlora_operator.kube.bounded_reads import TooLargeError
from qlora_operator.kube.client import TRANSIENT, Api, ApiError
from qlora_operator.kube.kopf_import import kopf
from qlora_operator.log_format import set_up_logs
from qlora_operator.serve import health
from qlora_operator.serve.metrics import Metrics
from qlora_operator.state.cache import Key, ObjectCache
from qlora_operator.state.sweep_cache import SweepCache
from qlora_operator.supervisor import BackgroundTask, supervise
from qlora_operator.watch import kopf_handlers
from qlora_operator.watch.kopf_session import PLURAL, watching_session
from qlora_operator.watch.list_watch import Watch, kinds_of, sweeps_kind
from qlora_operator.watch.progress_poller import ProgressPoller
from qlora_operator.watch.resync import Listings, list_jobs, resync_forever

log = logging.getLogger("qlora_operator")
GC_THRESHOLD = 20_000
"""Objects more than before, until the garbage collector looks at the young ones. Python's own is 700."""
LOOK_SECONDS = 300
"""Between two looks at what the cluster offers, and what it has learned of memory."""
STOP_SECONDS = 10
"""For all parts to end, before they are left behind."""
INITIAL_SYNC_RETRY_SECONDS = 2
"""Until the first look is tried again: the API server is not there yet, or does not serve QLoRAJobs yet."""


async def initial_sync(
    api: Api,
    cache: ObjectCache,
    namespaces: Sequence[str],
    watches: Sequence[Watch],
    skipped: Callable[[str, str], None],
) -> tuple[frozenset[Gang], set[str]]:
    """Ask for the cluster's capabilities and the namespaces that have the shared Service; the cache gets all else.

    Raises:
        ApiError: the operator may not look.

    """
    while True:
        try:
            gangs, services = await discover_gangs(api), await list_jobs(cache, api, namespaces, skipped)
            await list_all(watches)
        except (ApiError, TooLargeError, *TRANSIENT) as error:
            if isinstance(error, ApiError) and error.status in (401, 403):
                raise
            log.warning("the initial sync is not complete: %s; again in %d s", error, INITIAL_SYNC_RETRY_SECONDS)
            await asyncio.sleep(INITIAL_SYNC_RETRY_SECONDS)
        else:
            return gangs, services


async def list_all(watches: Sequence[Watch]) -> None:
    """List everything that belongs to QLoRAJobs, several kinds at once."""
    for events in (False, True):  # what is said of children means nothing before they are known
        lists = (watch.list() for watch in watches if watch.path.endswith("/events") is events)
        for done in await asyncio.gather(*lists, return_exceptions=True):
            if isinstance(done, BaseException):
                raise done


async def refresh_capabilities(
    api: Api, corrections: Corrections, set_gang_modes: Callable[[frozenset[Gang]], None]
) -> None:
    """Look again and again at what the cluster offers, and at what a person may have made of the corrections."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        await corrections.refresh()
        try:
            set_gang_modes(await discover_gangs(api))
        except (ApiError, *TRANSIENT) as error:
            log.info("the capabilities of the cluster cannot be read: %s", error)


def stop_on_signals(stop: asyncio.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


async def first_of(works: Collection[asyncio.Task[None]]) -> None:
    """Wait until one ends, and have the others end; raise what it raised."""
    try:
        done, others = await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for work in works:
            work.cancel()
    if others:
        await asyncio.wait(others, timeout=STOP_SECONDS)
    for work in done:
        work.result()


class Operator:
    """All parts, put together; :meth:`run` has them work."""

    def __init__(self, config: OperatorConfig) -> None:
        credentials = load_credentials()
        config = config.model_copy(update={"cluster": config.cluster or cluster_identity(credentials)})
        self.config = config
        self.sweeps = SweepCache()
        self.cache = ObjectCache(self.wake_sweep)
        self.metrics = Metrics(self.cache, self.sweeps)
        for kind in kopf_handlers.WATCHED:
            self.metrics.show_kind(kind)
        self.watches = health.Watches(kopf_handlers.WATCHED, each=max(1, len(config.namespaces)))
        self.listings = Listings()
        self.election = self.candidate() if config.lease else None
        self.api = Api(credentials, self.metrics.request, may_write=lambda: not self.standing_by())
        self.corrections = Corrections(self.api, config, self.metrics.corrected)
        self.gangs: frozenset[Gang] = frozenset()
        self.reconciler = Reconciler(self.cache, self.api, config, lambda: self.gangs, self.corrections, self.metrics)
        self.wake = self.reconciler.queue.add
        self.sweep_reconciler = SweepReconciler(self.sweeps, self.cache, self.api, config, self.metrics, self.wake)
        self.poller = ProgressPoller(
            self.cache,
            self.reconciler.polled,
            self.wake,
            config.progress_seconds,
            self.metrics.report_rejected,
            self.api.clock.now,
        )
        woken = [(kind, self.wake) for kind in kinds_of(self.cache, self.reconciler.children.services)]
        woken.append((sweeps_kind(self.sweeps), self.wake_sweep))
        self.followed = [
            Watch(self.api, kind, namespace, wake, self.watches.note, self.metrics.skipped)
            for kind, wake in woken
            for namespace in config.namespaces or ("",)
        ]
        self.stop, self.looked = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Operate until SIGTERM or SIGINT.

        Raises:
            ApiError: the operator may not look at what it is to serve, as it starts.

        """
        stop_on_signals(self.stop)
        server = await health.serve(self.metrics.registry, self.watches, self.config.metrics_port, self.standing_by)
        looking = await self.operate() if await self.leads() else None
        if self.election:
            await self.election.release()
            await self.election.close()
        await server.cleanup()
        await self.api.close()
        if looking and looking.done() and not looking.cancelled():
            looking.result()

    async def operate(self) -> asyncio.Task[None]:
        """Operate until told to stop, or until nothing can be seen; return the first look.

        Raises:
            LeadershipLostError: another replica may lead, and the process must end at once.

        """
        self.watches.begin()
        waiting, looking = asyncio.create_task(self.stop.wait()), asyncio.create_task(self.look())
        renewing = [asyncio.create_task(self.election.renew())] if self.election else []
        tasks = [asyncio.create_task(supervise(task, self.metrics.task_failed)) for task in self.background_tasks()]
        log.info("serving QLoRAJobs in %s", ", ".join(self.config.namespaces) or "all namespaces")
        await asyncio.wait((waiting, looking, *renewing), return_when=asyncio.FIRST_COMPLETED)
        if looking.done() and not looking.exception():
            await asyncio.wait((waiting, *renewing), return_when=asyncio.FIRST_COMPLETED)
        for lost in renewing:
            if lost.done():
                lost.result()
        self.stop.set()
        for task in (*tasks, waiting, looking, *renewing):
            task.cancel()
        await asyncio.wait((*tasks, waiting, looking, *renewing), timeout=STOP_SECONDS)
        return looking

    def candidate(self) -> LeaderElection:
        """Return this process as one that may lead."""
        name = os.environ.get("POD_NAME") or f"{socket.gethostname()}_{secrets.token_hex(4)}"
        return LeaderElection(Api(load_credentials(), self.metrics.request), self.config.lease, name)

    async def leads(self) -> bool:
        """Wait until this process leads; return whether it does before it is told to stop."""
        if self.election is None:
            return True
        waiting, acquiring = asyncio.create_task(self.stop.wait()), asyncio.create_task(self.election.acquire())
        await asyncio.wait((waiting, acquiring), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        acquiring.cancel()
        if acquiring.done():
            acquiring.result()
        return not self.stop.is_set()

    def standing_by(self) -> str:
        """Return the name of the leader, if this process is on standby; empty if it operates."""
        if self.election is None or self.election.leads:
            return ""
        return f"on standby: {self.election.holder or 'nobody'} leads"

    def background_tasks(self) -> Iterator[BackgroundTask]:
        """Return the concurrent tasks; the failure of one does not stop the others."""
        resync = partial(resync_forever, self.cache, self.api, self.wake, self.config.namespaces, self.listings)
        tasks = (
            BackgroundTask("reconciler", self.reconciler.run),
            BackgroundTask("sweeps", partial(self.sweep_reconciler.run, self.looked)),
            BackgroundTask("progress", self.poller.run),
            BackgroundTask("resync", resync),
            BackgroundTask(
                "capabilities", partial(refresh_capabilities, self.api, self.corrections, self.set_gang_modes)
            ),
            BackgroundTask(f"watch-{PLURAL}", self.watch),
            *(BackgroundTask(f"watch-{one.plural}", partial(one.run, self.looked)) for one in self.followed),
        )
        for task in tasks:
            self.metrics.show_task(task.name)
            yield task

    async def look(self) -> None:
        """List all objects before the first decision, as one that was not listed would count as deleted."""
        self.gangs, services = await initial_sync(
            self.api, self.cache, self.config.namespaces, self.followed, self.metrics.skipped
        )
        self.reconciler.begin()
        await self.corrections.refresh()
        self.reconciler.children.services |= services
        for key in (*dict(self.cache), *((namespace, "") for namespace in self.reconciler.children.services)):
            self.wake(key)
        for key, _ in self.sweeps:
            self.wake_sweep(key)
        self.metrics.operates = True
        self.looked.set()

    async def watch(self) -> None:
        """Have kopf watch the QLoRAJobs until cancelled."""
        works = await kopf.spawn_tasks(
            registry=kopf_handlers.handlers(self.cache, self.wake, self.looked, self.log_in),
            standalone=True,
            clusterwide=not self.config.namespaces,
            namespaces=self.config.namespaces,
        )
        stop_on_signals(self.stop)  # kopf has just taken them for itself
        # Not kopf.run_tasks: when a watch has failed for good, it waits for the others, and they for it (kopf#1276).
        await first_of(works)

    async def log_in(self) -> kopf.AiohttpSession:
        """Return a session of kopf's, by the same credentials as the operator's own calls."""
        current = await asyncio.to_thread(load_credentials)
        session = watching_session(current, self.note, self.metrics.skipped)
        return kopf.AiohttpSession(server=current.server, aiohttp_session=session)

    def wake_sweep(self, key: Key) -> None:
        """Have a sweep decided on: it or one of its trials has changed."""
        self.sweep_reconciler.queue.add(key)

    def note(self, path: str) -> None:
        """Take in that kopf asks for a path."""
        self.watches.note(path)
        self.listings.note(path)

    def set_gang_modes(self, gangs: frozenset[Gang]) -> None:
        """Take in what the cluster offers for gangs."""
        self.gangs = gangs


async def run(config: OperatorConfig) -> None:
    """Operate until SIGTERM or SIGINT."""
    await Operator(config).run()


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="qlora_operator", description="Run QLoRAJobs on this cluster.")
    parser.add_argument("--config", type=Path, required=True, help="settings, as the chart writes them")
    try:
        config = OperatorConfig.read(parser.parse_args().config)
    except (ManifestError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)
    set_up_logs(config.log_format)
    # What was imported stays, and most of what is read is gone at once without the collector, which would look
    # through thousands of jobs again and again.
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    gc.enable()
    runner, code = asyncio.Runner(), 0
    try:
        runner.run(run(config))
    except Exception:
        log.exception("the operator exits; Kubernetes restarts it")
        code = 1
    # Not runner.close(): some of the tasks that kopf leaves behind do not end. There is nothing to save.
    logging.shutdown()
    os._exit(code)
