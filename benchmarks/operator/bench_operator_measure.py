"""Measure a run of ``bench_operator.py``: processes, the API server's audit log, a watch of the jobs."""

from __future__ import annotations

import json
import os
import ssl
import statistics
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import httpx

from cluster.audit import READS
from cluster.control_plane import ControlPlane
from cluster.scenarios.jobs import GROUP

TICKS = os.sysconf("SC_CLK_TCK")
BUSY = 0.1
"""Share of a core from which a process counts as busy, over SAMPLE_SECONDS."""
SAMPLE_SECONDS = 0.2
QUIET_SECONDS = 5.0
"""A process that is not busy this long is quiet."""
OPERATOR = "qlora-operator"
CLIENT = "bench"


# ------------------------------------------------------------------------------------------------------------ processes


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident set of a process in MB (10⁶ bytes): now, and the highest so far."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    now, peak = (int(lines[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    return now, peak


def wait_quiet(pid: int, seconds: float = 120) -> float:
    """Wait until a process has nothing to do; ``time.monotonic()`` of when it last had."""
    last, before, deadline = time.monotonic(), cpu_seconds(pid), time.monotonic() + seconds
    while (now := time.monotonic()) < last + QUIET_SECONDS and now < deadline:
        time.sleep(SAMPLE_SECONDS)
        used = cpu_seconds(pid)
        if used - before > BUSY * SAMPLE_SECONDS:
            last = time.monotonic()
        before = used
    return last


def cpu_of(pids: Mapping[str, int]) -> dict[str, float]:
    return {name: cpu_seconds(pid) for name, pid in pids.items()}


def machine_cpu() -> tuple[float, float]:
    """CPU seconds of the whole machine: in use, and all."""
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS, sum(fields) / TICKS


# ------------------------------------------------------------------------------------------------------------ audit log


@dataclass
class Audit:
    """Requests to the API server: writes by who asked, and when jobs and their first children were made."""

    writes: Counter[str] = field(default_factory=Counter)
    """By user agent."""
    kinds: Counter[str] = field(default_factory=Counter)
    """The operator's own: verb, resource, and the code where it is not 2xx."""
    asked: dict[str, float] = field(default_factory=dict)
    """QLoRAJob: when its create arrived, in seconds."""
    made: dict[str, float] = field(default_factory=dict)
    """QLoRAJob: when the create of its first child Job was answered."""

    @property
    def latencies(self) -> list[float]:
        """Seconds from asking for each QLoRAJob to its child Job."""
        return sorted(self.made[name] - at for name, at in self.asked.items() if name in self.made)

    @property
    def seconds(self) -> float:
        """From the first QLoRAJob to the last child Job."""
        return max(self.made.values()) - min(self.asked.values())


def read_audit(log: Path, start: int) -> Audit:
    """Read from a byte offset on, as ``ControlPlane.audit_mark`` gives it."""
    found = Audit()
    with log.open("rb") as lines:
        lines.seek(start)
        for line in lines:
            if line.endswith(b"\n"):
                _take(found, json.loads(line))
    return found


def _take(found: Audit, event: Mapping[str, Any]) -> None:
    if event["verb"] in READS:
        return
    target, code = event.get("objectRef", {}), event.get("responseStatus", {}).get("code", 0)
    resource = "/".join(part for part in (target.get("resource"), target.get("subresource")) if part)
    agent = _short(event.get("userAgent", ""))
    found.writes[agent] += 1
    if agent == OPERATOR:
        found.kinds[f"{event['verb']} {resource}{'' if code < 300 else f' ({code})'}"] += 1
    if event["verb"] != "create" or code >= 300:
        return
    if resource == "qlorajobs":
        found.asked[target["name"]] = _seconds(event["requestReceivedTimestamp"])
    elif resource == "jobs":
        parent = target["name"].rpartition("-")[0]
        found.made.setdefault(parent, _seconds(event["stageTimestamp"]))


def _short(agent: str) -> str:
    """``…/system:serviceaccount:kube-system:job-controller`` is the job-controller; others are what comes first."""
    return agent.rpartition(":")[2] if "serviceaccount:" in agent else agent.partition("/")[0].partition(" ")[0]


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of all are not above."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)] if values else float("nan")


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


# ---------------------------------------------------------------------------------------------------------------- watch


class FinishedJobs:
    """Counts the QLoRAJobs that are over, from a watch of its own in a thread. A context manager."""

    def __init__(self, cluster: ControlPlane) -> None:
        self._client = httpx.Client(
            base_url=cluster.url,
            verify=ssl.create_default_context(cafile=cluster.authority.certificate),
            headers={"Authorization": f"Bearer {cluster.admin_token}", "User-Agent": CLIENT},
            timeout=httpx.Timeout(30, read=None),
            trust_env=False,
        )
        self._changed = threading.Condition()
        self._states: dict[str, str] = {}
        self._last = time.monotonic()
        self._closed = False
        listed = self._client.get(f"{GROUP}/qlorajobs", params={"limit": 1}).json()
        self._version = listed["metadata"]["resourceVersion"]
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def wait(self, names: set[str], seconds: float) -> float:
        """Wait until all of these jobs have succeeded; ``time.monotonic()`` of the last one.

        Raises:
            RuntimeError: a job failed, or they take longer.

        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while left := [name for name in names if self._states.get(name) != "Succeeded"]:
                failed = [name for name in left if self._states.get(name) == "Failed"]
                if failed or time.monotonic() > deadline:
                    states = Counter(self._states.get(name, "unknown") for name in names)
                    raise RuntimeError(f"not all jobs succeeded after {seconds:g} s: {dict(states)}")
                self._changed.wait(5)
            return self._last

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._client.close()

    def _watch(self) -> None:
        while not self._closed:
            parameters = {"watch": "true", "resourceVersion": self._version}
            try:
                with self._client.stream("GET", f"{GROUP}/qlorajobs", params=parameters) as answer:
                    for line in answer.iter_lines():
                        self._take(json.loads(line)["object"])
            except (httpx.HTTPError, RuntimeError):  # RuntimeError: closed meanwhile
                time.sleep(0.1)

    def _take(self, job: Mapping[str, Any]) -> None:
        self._version = job["metadata"]["resourceVersion"]
        name, state = job["metadata"]["name"], job.get("status", {}).get("state", "")
        with self._changed:
            if state in ("Succeeded", "Failed") and self._states.get(name) != state:
                self._last = time.monotonic()
                self._states[name] = state
                self._changed.notify_all()
