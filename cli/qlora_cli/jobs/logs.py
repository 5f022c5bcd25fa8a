"""``qlora logs``: the logs of all pods of a job as one, each line with the rank that wrote it."""

from __future__ import annotations

import heapq
import queue
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.jobs.job_view import view
from qlora_cli.kube.errors import ClusterError, KubeApiError, UnreachableError
from qlora_cli.kube.names import ATTEMPT_LABEL, CONTAINER, INDEX_LABEL, JOB_LABEL, core_path, jobs_path
from qlora_cli.kube.target import get_job, program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from qlora_cli.jobs.job_view import JobView
    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster

PREPARE = 0
_RANK = re.compile(r"^\S+ \S+ rank (\d+) (?P<rest>[A-Z]+ )")
"""As the trainer's ranks begin their lines: date, time, rank, level."""
RETRY_SECONDS = 2.0
QUIET_SECONDS = 0.5


@dataclass(frozen=True)
class Wanted:
    """Selection of logs."""

    attempt: int | None = None
    """PREPARE for the pod that prepares; None: the newest there is, and with ``follow`` those to come."""
    worker: int | None = None
    rank: int | None = None
    follow: bool = False
    tail: int | None = None
    since_seconds: int | None = None
    timestamps: bool = False


@dataclass(frozen=True, order=True)
class Line:
    """One line; they sort by time."""

    stamp: str
    """RFC 3339 with nanoseconds, from the kubelet. Comparable as text: all of the same length in UTC, nearly."""
    worker: int
    number: int
    text: str
    attempt: int = PREPARE
    rank: int | None = None


@dataclass(frozen=True)
class LogPod:
    """A pod with a log."""

    name: str
    uid: str
    attempt: int
    worker: int
    started: bool
    ended: bool


def pod_of(body: Object) -> LogPod:
    labels, status = body["metadata"].get("labels") or {}, body.get("status") or {}
    states = [c.get("state") or {} for c in status.get("containerStatuses") or () if c.get("name") == CONTAINER]
    state = states[0] if states else {}
    ended = "terminated" in state or status.get("phase") in ("Succeeded", "Failed")
    return LogPod(
        name=body["metadata"]["name"],
        uid=body["metadata"]["uid"],
        attempt=int(labels.get(ATTEMPT_LABEL, PREPARE)),
        worker=int(labels.get(INDEX_LABEL, 0)),
        started="running" in state or ended,
        ended=ended,
    )


class Splitter:
    """Finds out which rank wrote the lines of one pod.

    A line without a rank (a library's own print, a traceback) follows the rank that wrote just before, where the pod
    has one rank alone or the line is indented; else it is the worker's.
    """

    def __init__(self, pod: LogPod) -> None:
        self._pod = pod
        self._ranks: set[int] = set()
        self._last: int | None = None
        self._number = 0

    def line(self, raw: bytes) -> Line:
        """``raw`` has the kubelet's timestamp in front."""
        stamp, _, text = raw.decode(errors="replace").rstrip("\r").partition(" ")
        self._number += 1
        if found := _RANK.match(text):
            self._last = int(found[1])
            self._ranks.add(self._last)
            rank: int | None = self._last
        else:
            rank = self._last if len(self._ranks) == 1 or text.startswith((" ", "\t")) else None
        return Line(_even(stamp), self._pod.worker, self._number, text, self._pod.attempt, rank)


def _even(stamp: str) -> str:
    """The kubelet leaves out trailing zeros of the fraction; with them, texts sort as times do."""
    whole, _, fraction = stamp.removesuffix("Z").partition(".")
    return f"{whole}.{fraction:0<9}Z"


def prefix(line: Line) -> str:
    """``rank 3`` or ``worker 0``."""
    if line.attempt == PREPARE:
        return "prepare"
    return f"rank {line.rank}" if line.rank is not None else f"worker {line.worker}"


# -------------------------------------------------------------------------------------------------------------- reading


def read(cluster: Cluster, name: str, wanted: Wanted) -> Iterator[Line]:
    """Yield the lines of what has been written so far, merged by time.

    Raises:
        ClusterError: no such job, or no pod with a log.

    """
    job = get_job(cluster, name)
    path = core_path(cluster.namespace, "pods")
    bodies, _ = cluster.api.list(path, labelSelector=f"{JOB_LABEL}={name}")
    every = [pod_of(body) for body in bodies]
    pods = [pod for pod in every if pod.started]
    attempt = wanted.attempt if wanted.attempt is not None else max((p.attempt for p in pods), default=PREPARE)
    chosen = [p for p in pods if p.attempt == attempt and wanted.worker in (None, p.worker)]
    if not chosen:
        raise ClusterError(_nothing(job, wanted, every))
    merged = heapq.merge(*(_once(cluster, pod, wanted) for pod in chosen))
    yield from _of_rank(merged, wanted)


def _nothing(job: Object, wanted: Wanted, pods: Sequence[LogPod]) -> str:
    """Return why there is no log, and where there is one."""
    current = view(job)
    there = sorted({p.attempt for p in pods if p.started})
    named = ", ".join("Prepare" if a == PREPARE else f"attempt {a}" for a in there)
    if there and (wanted.attempt is not None or wanted.worker is not None):
        return f'job "{current.name}" has no log of what is asked for; there are logs of {named}'
    if not pods and (current.is_finished or current.attempts):
        last = f"'{program()} show {current.name}' has its termination message"
        return f'job "{current.name}" has no pods any more, and logs go with them; {last}'
    return _no_log_yet(current)


def _no_log_yet(job: JobView) -> str:
    message = f": {job.message}" if job.message else ""
    return f'job "{job.name}" has written no log yet, it is {job.state} ({job.reason}){message}'


def _once(cluster: Cluster, pod: LogPod, wanted: Wanted) -> Iterator[Line]:
    splitter = Splitter(pod)
    try:
        for raw in cluster.api.lines(_log_path(cluster, pod), **_parameters(wanted)):
            yield splitter.line(raw)
    except KubeApiError as error:
        if not error.not_found:  # deleted meanwhile
            raise


def _log_path(cluster: Cluster, pod: LogPod) -> str:
    return core_path(cluster.namespace, "pods", pod.name) + "/log"


def _parameters(wanted: Wanted) -> dict[str, object]:
    return {
        "container": CONTAINER,
        "timestamps": "true",
        "tailLines": wanted.tail,
        "sinceSeconds": wanted.since_seconds,
    }


def _of_rank(lines: Iterable[Line], wanted: Wanted) -> Iterator[Line]:
    for line in lines:
        if wanted.rank in (None, line.rank):
            yield line


# ------------------------------------------------------------------------------------------------------------ following


class Follower:
    """Streams every pod of a job as it comes to life, until the job is over (or the attempt, where one is named)."""

    def __init__(self, cluster: Cluster, name: str, wanted: Wanted) -> None:
        """Raises ClusterError: no such job."""
        self._cluster, self._name, self._wanted = cluster, name, wanted
        self._job = view(get_job(cluster, name))
        self._lines: queue.SimpleQueue[Line | Exception] = queue.SimpleQueue()
        self._streams: dict[str, threading.Thread] = {}
        self._pods: dict[str, LogPod] = {}
        self._first = PREPARE
        """Attempts before this one are passed over."""
        self._listed = False
        self._gone = False
        self._quiet = 0

    def lines(self, tell: Callable[[str], None] = lambda _: None) -> Iterator[Line]:
        """Yield the lines as they come. ``tell`` is told why there are none yet.

        Raises:
            ClusterError: logs or pods may not be read.

        """
        for work in (self._watch_pods, self._watch_job):
            threading.Thread(target=self._guarded, args=(work,), daemon=True).start()
        while True:
            try:
                line = self._lines.get(timeout=QUIET_SECONDS)
            except queue.Empty:
                # The watches of job and pods are two: the end of the one may overtake the last pod of the other.
                if self._listed and not self._streams and not self._job.is_finished:
                    tell(_no_log_yet(self._job))
                    tell = lambda _: None  # noqa: E731 once is enough
                self._quiet = self._quiet + 1 if self._done() else 0
                if self._quiet > 1:
                    return
                continue
            if isinstance(line, Exception):
                raise line
            if self._wanted.rank in (None, line.rank):
                yield line

    def _done(self) -> bool:
        """Nothing is to come, and nothing is left in the queue."""
        if not self._listed or not self._lines.empty():
            return False
        if any(stream.is_alive() for stream in self._streams.values()):
            return False
        if self._gone or self._job.is_finished:
            return True
        ours = [p for p in self._pods.values() if p.attempt == self._wanted.attempt]
        attempt = next((a for a in self._job.attempts if a.number == self._wanted.attempt), None)
        if self._wanted.attempt == PREPARE:
            return bool(ours) and all(p.ended for p in ours)
        return attempt is not None and attempt.ended is not None

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 whatever it is, it is raised where somebody sees it
            self._lines.put(error)

    def _watch_job(self) -> None:
        path = jobs_path(self._cluster.namespace)
        for event in self._cluster.api.follow(path, fieldSelector=f"metadata.name={self._name}"):
            if event.kind == "DELETED" or (event.kind == "LISTED" and not event.items):
                self._gone = True
                return
            if event.items:
                self._job = view(event.items[0])

    def _watch_pods(self) -> None:
        path, selector = core_path(self._cluster.namespace, "pods"), f"{JOB_LABEL}={self._name}"
        for event in self._cluster.api.follow(path, labelSelector=selector):
            pods = [pod_of(body) for body in event.items]
            if event.kind == "LISTED":
                self._choose(pods)
            for pod in pods:
                self._pods[pod.uid] = pod
                if pod.started and event.kind != "DELETED" and self._is_wanted(pod):
                    self._stream(pod)
            self._listed = True

    def _choose(self, pods: Sequence[LogPod]) -> None:
        """At the start, attempts that are over are passed over, as without --follow."""
        if not self._listed:
            newest = max((p.attempt for p in pods if p.started), default=PREPARE)
            self._first = newest if self._wanted.attempt is None else self._wanted.attempt

    def _is_wanted(self, pod: LogPod) -> bool:
        if self._wanted.worker not in (None, pod.worker):
            return False
        return pod.attempt == self._wanted.attempt if self._wanted.attempt is not None else pod.attempt >= self._first

    def _stream(self, pod: LogPod) -> None:
        if pod.uid not in self._streams:
            thread = threading.Thread(target=self._guarded, args=(lambda: self._pump(pod),), daemon=True)
            self._streams[pod.uid] = thread
            thread.start()

    def _pump(self, pod: LogPod) -> None:
        """Put one pod's lines into the queue until it has ended; a stream that breaks goes on where it broke."""
        splitter, newest, told = Splitter(pod), "", ""
        parameters = {**_parameters(self._wanted), "follow": "true"}
        while True:
            try:
                for raw in self._cluster.api.lines(_log_path(self._cluster, pod), **parameters):
                    line = splitter.line(raw)
                    if line.stamp > told:  # not what was told before the stream broke
                        newest = line.stamp
                        self._lines.put(line)
            except UnreachableError:
                pass
            except KubeApiError as error:
                if error.forbidden:
                    raise
                if error.not_found:
                    return
            if self._pods[pod.uid].ended or self._gone:
                return
            time.sleep(RETRY_SECONDS)
            told = newest
            if newest:
                parameters = {**parameters, "sinceTime": newest, "tailLines": None, "sinceSeconds": None}
