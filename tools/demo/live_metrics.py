"""A real Prometheus over a real training on this machine, and over a real operator with jobs on fake nodes.

Used by the test that runs every query, and by ``make pictures``. Only what a GPU alone can say is made up here: its
memory, what was learned of it, how long a job takes on it, and DCGM's exporter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Self

from cluster.control_plane import ControlPlane
from cluster.scenarios.jobs import create_job, in_state, job_path, qlora_job, serve_crd
from cluster.scenarios.operator import OperatorProcess
from cluster.scenarios.script import pods_do
from cluster.scenarios.sweeps import SWEEP, create_sweep, qlora_sweep
from cluster.scenarios.whole_life import PREPARED
from demo.material import make_material
from qlora_api.batch import split_batch
from qlora_api.contract import JobRef, TrainerConfig
from qlora_api.spec import QLoRAJobSpec
from qlora_operator.names import METRICS_PORT
from services.prometheus import Prometheus, scrape
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

REPOSITORY = Path(__file__).parents[2]
RULES = REPOSITORY / "charts" / "qlora-operator" / "files" / "alerts.yaml"
NAME, TEAM, OTHERS = "answers", "team-a", "team-b"
POD = f"{NAME}-1-0"
ADDRESS = f"127.{os.getpid() % 200 + 10}.9.4"
"""Address of the job's pod, on which the training serves its progress, so that the operator reads it as from a real
pod."""
LEARNED = "learned-memory"
STEPS = 240
EVALUATION_STEPS = 8
SCRAPE_SECONDS = 1
SEEN_SECONDS = 25
"""Seconds of steps that are scraped: enough for rates over 15 s."""
WAIT_SECONDS = PATIENCE_SECONDS
GIB = 1 << 30
GPU_SERIES = {
    "qlora_device_peak_flops_per_second": 989.5e12,
    "qlora_gpu_memory_allocated_bytes": 17.2 * GIB,
    "qlora_gpu_memory_reserved_bytes": 18.9 * GIB,
    "qlora_gpu_memory_peak_bytes": 22.4 * GIB,
    "qlora_gpu_memory_free_bytes": 55.6 * GIB,
    "qlora_gpu_memory_total_bytes": 79.1 * GIB,
    'qlora_memory_predicted_bytes{component="peak"}': 22.7 * GIB,
}
"""Metrics that only a rank on a GPU has."""


def word(code: int, reason: str, message: str, **more: object) -> str:
    """A trainer's termination message."""
    progress = {"step": 10, "totalSteps": 10, "loss": "1.25", "bestEvalLoss": "1.5", "tokensPerSecond": "9000"}
    return json.dumps({"exitCode": code, "reason": reason, "message": message, "progress": progress, **more})


def ends(code: int, reason: str, message: str = "as it was told to", **more: object) -> dict[str, object]:
    return {"run-seconds": "1", "exit-code": code, "termination-message": word(code, reason, message, **more)}


def ended_twice(job: Mapping[str, Any]) -> bool:
    return sum("endTime" in attempt for attempt in job.get("status", {}).get("attempts", ())) >= 2


MEASURED = {"measured": {"peak": 24 * GIB, "quantizedWeights": 4 * GIB}}
OTHER_JOBS: Mapping[str, tuple[dict[str, object], int | None]] = {
    "done": (ends(0, "Completed", memory=MEASURED), None),
    "stalls": (ends(44, "Stalled", "rank 1 on fake-2 has been silent for 1800 s"), 1),
    "large": (ends(41, "OutOfDeviceMemory", "tried to allocate 2.00 GiB"), None),
    "diverges": (ends(45, "NonFiniteLoss", "the loss of step 3 is nan"), None),
    "rejected": (ends(48, "AdapterRejected", "B is all zero"), None),
    "waits": ({}, None),
}
"""Behaviour of each job's pods, and the attempt in which they show it (None: all attempts)."""
GROUPS: Mapping[str, dict[str, Any]] = {
    "waits": {"parallelism": {"gpusPerWorker": 16}},
    "large": {"policy": {"maxRestarts": 8, "activeDeadlineSeconds": 7200}},
    "stalls": {"policy": {"budgetGpuHours": "8"}},
}


class LiveMetrics:
    """Everything started, the training included. A context manager.

    Args:
        folder: for everything's data and logs.
        gpus: with stand-ins for what only GPUs say.
        seen_seconds: how long steps are scraped at least.
        steps: of the training; as many as take longer than that.

    """

    def __init__(
        self, folder: Path, *, gpus: bool = True, seen_seconds: float = SEEN_SECONDS, steps: int = STEPS
    ) -> None:
        self.folder = folder
        self._gpus, self._seen_seconds, self._steps = gpus, seen_seconds, steps
        self.began_at = 0.0
        self._owned = ExitStack()
        self._over = Event()
        self.ended_at = 0.0
        """Time of the last look at a training that ran."""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._owned.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def _start(self) -> None:
        (self.folder / "material").mkdir(parents=True)
        make_material(self.folder / "material")
        cluster = self._owned.enter_context(ControlPlane(self.folder / "cluster"))
        cluster.add_kwok_nodes(4)
        serve_crd(cluster)
        for name in (TEAM, OTHERS):
            cluster.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        self.api, self.kubeconfig = cluster.api, cluster.kubeconfig
        if self._gpus:
            self._learned()
        settings = {"memoryConfigMap": f"{TEAM}/{LEARNED}"} if self._gpus else {}
        self.operator = self._owned.enter_context(
            OperatorProcess(self.folder / "operator", cluster.kubeconfig, **settings)
        )
        targets = self.folder / "targets.json"
        targets.write_text("[]")
        self.prometheus = self._owned.enter_context(
            Prometheus(
                self.folder / "prometheus",
                [
                    scrape("operator", f"127.0.0.1:{self.operator.port}", **_SCRAPE),
                    {"job_name": "trainers", "file_sd_configs": [{"files": [str(targets)]}], **_SCRAPE},
                    *self._stand_ins(),
                ],
                [RULES],
            )
        )
        self.training = _Training(self.folder, targets, self._steps)
        self._owned.callback(self.training.stop)

    def _learned(self) -> None:
        """As from jobs that ended on such a GPU."""
        data = {"h100-80gb.NF4": json.dumps({"correction": 1.03, "jobs": 12})}
        self.api.create(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": LEARNED, "namespace": TEAM}, "data": data}
        )

    def _prepared(self) -> None:
        """As by a Prepare that knows the GPU."""
        status = {"prepared": {**PREPARED, "expectedGpuHours": "12.5"}}
        self.api.patch(f"{job_path(OTHERS, 'waits')}/status", {"status": status})

    def _stand_ins(self) -> Iterator[dict[str, Any]]:
        if self._gpus:
            port = self._owned.enter_context(_Exporter()).port
            yield scrape("gpu", f"127.0.0.1:{port}", **_SCRAPE)
            # As DCGM's exporter is mostly scraped: its own labels are renamed, for a target has pod and namespace too.
            labels = {"pod": "dcgm-exporter-x2b4", "namespace": "gpu-operator"}
            targets = [{"targets": [f"127.0.0.1:{port}"], "labels": labels}]
            yield {"job_name": "dcgm", "metrics_path": "/dcgm", "scrape_interval": "1s", "static_configs": targets}

    def play(self, before_the_end: Callable[[], None] = lambda: None) -> None:
        """Have jobs of every kind, and the training until enough of it was seen, and something else before it ends."""
        with ExitStack() as scripts:
            # Before all else, as counts of a sweep are written late: one trial succeeds, and the next one trains.
            scripts.enter_context(pods_do(self.api, OTHERS, ends(0, "Completed"), job=f"{SWEEP}-0"))
            sweep = create_sweep(self.api, qlora_sweep(OTHERS, parallelTrials=1, budgetGpuHours="8"))
            self.api.wait_for(sweep, lambda found: "best" in found.get("status", {}), seconds=WAIT_SECONDS)
            scripts.enter_context(pods_do(self.api, TEAM, {"pod-ip": ADDRESS}, job=NAME))
            create_job(self.api, qlora_job(NAME, TEAM, **self.training.groups))
            self.training.start()
            for name, (does, attempt) in OTHER_JOBS.items():
                if does:
                    scripts.enter_context(pods_do(self.api, OTHERS, does, job=name, attempt=attempt))
            for name in OTHER_JOBS:
                create_job(self.api, qlora_job(name, OTHERS, **GROUPS.get(name, {})))
            self.api.wait_for(job_path(OTHERS, "done"), in_state("Succeeded"))
            self.api.wait_for(job_path(OTHERS, "waits"), in_state("Pending", "Unschedulable"))
            if self._gpus:
                self._prepared()
            self.api.wait_for(job_path(OTHERS, "large"), ended_twice, seconds=WAIT_SECONDS)
            self.began_at, self.ended_at = self.training.watch(self._keep_busy, self._seen_seconds)
            before_the_end()
            self.training.stop()

    def _keep_busy(self) -> None:
        """Give the operator something to look at, as a cluster does that lives."""
        self.api.patch(job_path(OTHERS, "waits"), {"metadata": {"annotations": {"seen": str(time.time())}}})

    def at_the_end(self, expression: str) -> list[dict[str, Any]]:
        """Evaluate an expression at the last time the training was looked at."""
        return list(self.prometheus._get("query", query=expression, time=str(self.ended_at))["result"])


_SCRAPE = {"honor_labels": True, "scrape_interval": f"{SCRAPE_SECONDS}s", "scrape_timeout": f"{SCRAPE_SECONDS}s"}


class _Training:
    """Two ranks on the CPU, by the contract with whoever starts a trainer; their ports are targets while they live."""

    def __init__(self, folder: Path, targets: Path, steps: int) -> None:
        self._folder, self._targets = folder, targets
        self.groups: dict[str, dict[str, Any]] = {
            "dataset": {
                "eval": {"source": "s3://data/eval.jsonl"},
                "format": "PromptCompletion",
                "maxLength": 128,
                "longRows": "Drop",
            },
            "training": {
                "maxSteps": steps,
                "globalBatchSize": 4,
                "microBatchSize": 1,
                "learningRate": "5e-3",
                "evaluation": {"everySteps": EVALUATION_STEPS},
            },
            "checkpoint": {"everySteps": EVALUATION_STEPS},
            "parallelism": {"gpusPerWorker": 2},
        }
        """Groups of the training's spec that are also in the QLoRAJob in the cluster."""
        self._ports = folder / "ports"
        self._process: subprocess.Popen[bytes] | None = None
        self._last = 0.0

    def start(self) -> None:
        path = self._folder / "config.json"
        path.write_text(self._config().model_dump_json(by_alias=True))
        with (self._folder / "training.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "qlora_trainer", str(path)],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )

    def watch(self, meanwhile: Callable[[], None], seen_seconds: float) -> tuple[float, float]:
        """Keep the targets until enough was seen, or the training is over; when steps were seen first and last."""
        assert self._process is not None
        deadline = time.monotonic() + WAIT_SECONDS + seen_seconds
        first, last, steps = 0.0, 0.0, 0
        while self._process.poll() is None and not (first and last > first + seen_seconds and self._evaluated()):
            assert time.monotonic() < deadline, self.log[-3000:]
            self._look()
            meanwhile()
            count = self.log.count(" INFO step ")
            if count > steps:  # at the end ranks leave before their launcher does
                steps, last = count, time.time() - SCRAPE_SECONDS
                first = first or last
            time.sleep(1)
        assert first, self.log[-3000:]
        return first, last

    def _evaluated(self) -> bool:
        """Also after the first step, so that all sections are there."""
        return f" step {EVALUATION_STEPS} eval loss" in self.log

    @property
    def log(self) -> str:
        return (self._folder / "training.log").read_text()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(30)

    def _look(self) -> None:
        ports = [p.read_text() for p in sorted(self._ports.glob("rank-*.port"))]
        labels = {"pod": POD, "node": "fake-0"}  # as the chart's PodMonitor has them
        text = json.dumps([{"targets": [f"{ADDRESS}:{port}" for port in ports], "labels": labels}] if ports else [])
        if self._targets.read_text() != text:
            fresh = self._targets.with_suffix(".new")
            fresh.write_text(text)
            fresh.rename(self._targets)

    def _config(self) -> TrainerConfig:
        material = self._folder / "material"
        sources = {name: {"source": str(material / f"{name}.jsonl")} for name in ("train", "eval")}
        spec = QLoRAJobSpec.model_validate(
            {
                **self.groups,
                "model": {"source": str(material / "base")},
                "dataset": {**self.groups["dataset"], **sources},
                "output": {"destination": str(self._folder / "out")},
            }
        )
        return TrainerConfig(
            job=JobRef(name=NAME, namespace=TEAM, uid="0a1b2c3d-live"),
            spec=spec,
            batch=split_batch(spec, 2),
            device="CPU",
            ranks_per_worker=2,
            gradient_checkpointing=False,
            checkpoint_uri=str(self._folder / "checkpoints"),
            cache_dir=str(self._folder / "cache"),
            termination_message_path=str(self._folder / "termination.json"),
            metrics_port=METRICS_PORT,
            metrics_host=ADDRESS,
            ports_dir=str(self._ports),
        )


class _Exporter:
    """Exporter of what only machines with GPUs export: each rank's card, and DCGM's exporter. A context manager."""

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write("".join(dcgm() if self.path == "/dcgm" else gpus()).encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def gpus() -> Iterator[str]:
    for rank in range(2):
        labels = f'job="{NAME}",namespace="{TEAM}",rank="{rank}",pod="{POD}"'
        for name, value in GPU_SERIES.items():
            series, _, more = name.rstrip("}").partition("{")
            yield f"{series}{{{labels}{more and f',{more}'}}} {value}\n"
        for direction in ("receive", "transmit"):
            yield f'qlora_gpu_pcie_bytes_per_second{{{labels},direction="{direction}"}} 2.5e8\n'


def dcgm() -> Iterator[str]:
    """In the form of DCGM's exporter 4: https://github.com/NVIDIA/dcgm-exporter"""
    for gpu, holder in ((0, POD), (1, POD), (2, "")):
        held = f',container="trainer",namespace="{TEAM}",pod="{holder}"' if holder else ""
        labels = (
            f'gpu="{gpu}",UUID="GPU-{gpu}",device="nvidia{gpu}",modelName="NVIDIA H100 80GB HBM3",Hostname="n"{held}'
        )
        yield f"DCGM_FI_DEV_GPU_UTIL{{{labels}}} 97\n"
        yield f"DCGM_FI_DEV_POWER_USAGE{{{labels}}} 612.5\n"
