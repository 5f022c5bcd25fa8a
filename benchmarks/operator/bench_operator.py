"""The operator under load, on a real control plane with fake nodes: ``make bench-operator``

etcd, API server, controller manager and scheduler of a real Kubernetes, audit log on, leader election off; pods run for
a second on kwok's nodes and end with a real termination message. 10 parallel clients create jobs of two workers:

- ``burst-100``, ``prepare-100``: 100 at once on a fresh cluster; with Prepare on.
- ``steady``: 3 a second.
- ``scale``: 1,000 at once, a restart of the operator, then 1,000 more at a time up to ``--jobs``, and a restart.

Everything shares this machine's cores, so times say as much about the machine as about the operator; counts of writes
and CPU seconds say more. The load of others is measured and printed beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from bench_operator_measure import (
    OPERATOR,
    FinishedJobs,
    cpu_of,
    cpu_seconds,
    machine_cpu,
    median,
    memory_mb,
    quantile,
    read_audit,
    wait_quiet,
)
from bench_operator_report import tables
from cluster.api import Object
from cluster.control_plane import ControlPlane, Settings
from cluster.scenarios.jobs import CRDS, qlora_job
from cluster.scenarios.operator import OperatorProcess
from cluster.scenarios.script import pods_do
from cluster.scenarios.sweeps import qlora_sweep
from qlora_api.sweep.trials import trial_name

CRD_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qlorajobs.qlora.dev"
CLIENTS = 10
WORKERS = 2
NODES, GPUS = 25, 100
"""Room for a thousand jobs at once. Few nodes with many GPUs: each node's lease is a write every 10 s."""
POD = {"cpu": "100m", "memory": "1Gi"}
PER_SECOND, STEADY_SECONDS = 3, 60
BURST = 1000
LIMIT_SECONDS = 900
BYTECODE = Path("build/bench-operator-bytecode")
AUDIT_LOG_MB = 100_000
"""It must not rotate: it is read from offsets."""

DONE = {
    "exitCode": 0,
    "reason": "Completed",
    "message": "step 1200 of 1200, loss 1.0312, best eval loss 1.1043; the adapter is published",
    "progress": {
        "step": 1200,
        "totalSteps": 1200,
        "epoch": "3.00",
        "loss": "1.0312",
        "evalLoss": "1.1043",
        "bestEvalLoss": "1.1043",
        "learningRate": "2e-06",
        "tokensPerSecond": "20411.7",
        "etaSeconds": 0,
    },
    "memory": {
        "measured": {
            "quantizedWeights": 4_024_401_920,
            "quantizationConstants": 131_072_000,
            "unquantizedWeights": 2_101_346_304,
            "adapterWeights": 167_772_160,
            "gradients": 167_772_160,
            "optimizerState": 83_886_080,
            "peak": 23_914_872_832,
        }
    },
    "adapter": {
        "uri": "s3://adapters/job/3f2a9c31-attempt-1/adapter",
        "manifestUri": "s3://adapters/job/manifest.json",
        "manifestSha256": "a" * 64,
    },
}
PREPARED = {
    "exitCode": 0,
    "reason": "Prepared",
    "message": "12000 rows in 3411 packs",
    "prepared": {
        "modelRevision": "0e9e39f249a16976918f6564b8830bc894c89659",
        "dataHash": "b" * 64,
        "trainRows": 12000,
        "trainTokens": 6_900_112,
        "trainSequences": 3411,
        "evalRows": 240,
        "packingEfficiency": "0.988",
        "batch": {"worldSize": 2, "microBatchSize": 4, "gradientAccumulationSteps": 2},
        "gradientCheckpointing": True,
        "memory": {"quantizedWeights": 4_024_401_920, "adapterWeights": 167_772_160, "peak": 23_000_000_000},
        "seconds": "41.3",
    },
}


TRIALS = 20
"""Trials of the sweep, of which two run at a time."""


@dataclass
class Load:
    """Figures of one load of jobs, from their creation until all have succeeded and the operator is quiet."""

    name: str
    jobs: int
    there: int
    """Finished jobs that were there before."""
    children_seconds: float
    succeeded_seconds: float
    child_p50_seconds: float
    child_p99_seconds: float
    writes: dict[str, float]
    """For each job, by user agent."""
    operator_writes: dict[str, float]
    """The operator's own for each job, by kind."""
    cpu: dict[str, float]
    """CPU seconds by process."""
    others_cpu: float
    """CPU seconds of everything else on the machine."""
    memory_peak_mb: float
    """Peak memory of the operator since it started."""
    memory_after_mb: float


@dataclass
class Restart:
    """Figures of a restart of the operator."""

    jobs: int
    writes: int
    quiet_seconds: float
    """From its start until it has no more to do, interpreter and imports included."""
    cpu_seconds: float
    memory_peak_mb: float
    memory_after_mb: float


@dataclass
class BenchmarkReport:
    """All figures of one invocation."""

    load_average: tuple[float, float, float]
    loads: list[Load] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)


class Bench:
    """One cluster with the operator."""

    def __init__(
        self, cluster: ControlPlane, operator: OperatorProcess, namespace: str, finished: FinishedJobs
    ) -> None:
        self.cluster, self.operator, self.namespace, self._finished = cluster, operator, namespace, finished
        self._there = 0

    def load(self, name: str, count: int, per_second: float = 0) -> Load:
        """Create jobs, as fast as the clients can or at a steady rate, and measure until all is done."""
        names = [f"job-{self._there + number:05d}" for number in range(count)]
        return self._measured(name, names, lambda: self._create(names, per_second))

    def sweeps(self, name: str, count: int) -> Load:
        """Create sweeps and measure until all of their trials, which the operator creates, are done."""
        names = [trial_name(f"sweep-{sweep}", number) for sweep in range(count) for number in range(TRIALS)]

        def create() -> None:
            choices = {"path": "lora.alpha", "choices": list(range(1, TRIALS + 1))}
            for sweep in range(count):
                manifest = qlora_sweep(self.namespace, f"sweep-{sweep}", parameters=[choices], maxTrials=TRIALS)
                self.cluster.api.create(manifest)

        return self._measured(name, names, create)

    def _measured(self, name: str, names: list[str], create: Callable[[], None]) -> Load:
        count = len(names)
        pids = {**self.cluster.pids, "operator": self.operator.pid, "clients": os.getpid()}
        mark, cpu, (used, _) = self.cluster.audit_mark(), cpu_of(pids), machine_cpu()
        started = time.monotonic()
        create()
        ended = self._finished.wait(set(names), LIMIT_SECONDS)
        wait_quiet(self.operator.pid)
        took = {name: after - cpu[name] for name, after in cpu_of(pids).items()}
        others = machine_cpu()[0] - used - sum(took.values())
        audit = read_audit(self.cluster.logs / "audit.log", mark)
        latencies = audit.latencies
        if len(latencies) != count:
            raise RuntimeError(f"the audit log has the children of {len(latencies)} of {count} jobs")
        now, peak = memory_mb(self.operator.pid)
        there, self._there = self._there, self._there + count
        return Load(
            name=name,
            jobs=count,
            there=there,
            children_seconds=audit.seconds,
            succeeded_seconds=ended - started,
            child_p50_seconds=median(latencies),
            child_p99_seconds=quantile(latencies, 0.99),
            writes={agent: n / count for agent, n in audit.writes.most_common()},
            operator_writes={kind: n / count for kind, n in audit.kinds.most_common()},
            cpu=took,
            others_cpu=others,
            memory_peak_mb=peak,
            memory_after_mb=now,
        )

    def restart(self) -> Restart:
        """Stop the operator, start it again, and measure until it has taken in all there is."""
        self.operator.stop()
        mark = self.cluster.audit_mark()
        started = time.monotonic()
        self.operator.start()
        quiet = wait_quiet(self.operator.pid)
        now, peak = memory_mb(self.operator.pid)
        writes = read_audit(self.cluster.logs / "audit.log", mark).writes[OPERATOR]
        return Restart(self._there, writes, quiet - started, cpu_seconds(self.operator.pid), peak, now)

    def _create(self, names: list[str], per_second: float) -> None:
        begin = time.monotonic()

        def create(number: int, name: str) -> None:
            if per_second:
                time.sleep(max(0.0, begin + number / per_second - time.monotonic()))
            self.cluster.api.create(qlora_job(name, self.namespace, workers=WORKERS))

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(create, range(len(names)), names))


@contextmanager
def bench(folder: Path, *, prepare: bool = False, gang: bool = False) -> Iterator[Bench]:
    """Start everything in a folder of its own; nothing of it stays."""
    settings = Settings(gang_scheduling=gang, api_server_flags=(f"--audit-log-maxsize={AUDIT_LOG_MB}",))
    with ExitStack() as stack:
        cluster = stack.enter_context(ControlPlane(folder / "cluster", settings))
        cluster.kubectl("apply", "-f", CRDS)
        # Not by "kubectl wait", which fails on a CustomResourceDefinition that has no status yet.
        cluster.api.wait_for(CRD_PATH, _is_established, what="QLoRAJobs are served")
        cluster.add_kwok_nodes(NODES, gpus=GPUS)
        namespace = cluster.create_namespace("bench")
        config = {"progressSeconds": 15, "prepare": {"enabled": prepare, **POD}, "trainer": POD}
        operator = stack.enter_context(OperatorProcess(folder / "operator", cluster.kubeconfig, **config))
        for component, word in (("prepare", PREPARED), ("trainer", DONE)):
            does = {"run-seconds": 1, "exit-code": 0, "termination-message": json.dumps(word)}
            stack.enter_context(pods_do(cluster.api, namespace, does, component=component))
        finished = stack.enter_context(FinishedJobs(cluster))
        wait_quiet(operator.pid)
        yield Bench(cluster, operator, namespace, finished)


def _is_established(crd: Object) -> bool:
    conditions = crd.get("status", {}).get("conditions") or ()
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


# ------------------------------------------------------------------------------------------------------------ scenarios


def burst_100(folder: Path, report: BenchmarkReport, _: argparse.Namespace) -> None:
    with bench(folder) as one:
        report.loads.append(one.load("100 at once", 100))


def prepare_100(folder: Path, report: BenchmarkReport, _: argparse.Namespace) -> None:
    with bench(folder, prepare=True) as one:
        report.loads.append(one.load("100 at once, Prepare on", 100))


def gang_100(folder: Path, report: BenchmarkReport, _: argparse.Namespace) -> None:
    with bench(folder, gang=True) as one:
        report.loads.append(one.load("100 at once, native gangs", 100))


def steady(folder: Path, report: BenchmarkReport, _: argparse.Namespace) -> None:
    with bench(folder) as one:
        report.loads.append(one.load(f"{PER_SECOND} a second", PER_SECOND * STEADY_SECONDS, PER_SECOND))


def scale(folder: Path, report: BenchmarkReport, arguments: argparse.Namespace) -> None:
    with bench(folder) as one:
        for there in range(0, arguments.jobs, BURST):
            report.loads.append(one.load(f"{BURST:,} at once, {there:,} there", BURST))
            if there in (0, arguments.jobs - BURST):
                report.restarts.append(one.restart())


def sweeps(folder: Path, report: BenchmarkReport, arguments: argparse.Namespace) -> None:
    with bench(folder) as one:
        report.loads.append(one.sweeps(f"{arguments.sweeps} sweeps of {TRIALS} trials", arguments.sweeps))


SCENARIOS = {
    "burst-100": burst_100,
    "prepare-100": prepare_100,
    "gang-100": gang_100,
    "steady": steady,
    "scale": scale,
    "sweeps": sweeps,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="leave the other scenarios out")
    parser.add_argument("--repeats", type=int, default=1, help="of each scenario")
    parser.add_argument("--jobs", type=int, default=5000, help="in all, of the scenario 'scale'; thousands")
    parser.add_argument("--sweeps", type=int, default=100, help="of the scenario 'sweeps'")
    parser.add_argument("--out", type=Path, default=Path("build/bench-operator.json"), help="for the figures as JSON")
    arguments = parser.parse_args()
    # The operator finds its bytecode, as it does in its image, whatever the environment of this process says.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(BYTECODE.absolute())
    report = BenchmarkReport(os.getloadavg())
    for _ in range(arguments.repeats):
        for name in arguments.only or SCENARIOS:
            with tempfile.TemporaryDirectory(prefix="qlora-bench-operator-") as folder:
                SCENARIOS[name](Path(folder), report, arguments)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(asdict(report), indent=2) + "\n")
            print(f"{name} done, load average {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    print(tables(asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
