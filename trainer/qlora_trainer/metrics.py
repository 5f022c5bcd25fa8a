"""What the outside sees of a rank: Prometheus metrics on ``/metrics``, and on ``/progress`` the state as JSON.

Base units, documented names; labels are job, namespace and rank, bounded by the job itself. Gauges of memory are read
when they are scraped, not when a step ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import psutil
import pynvml
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from qlora_api.contract import ProgressReport, TrainerConfig
from qlora_api.status import Memory, MemoryComponent
from qlora_trainer.engine import Ranks

Section = Literal["Load", "Data", "Train", "Evaluate", "Checkpoint", "Publish", "Done"]

LABELS = ("job", "namespace", "rank")
STEP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)

GAUGES = {
    "qlora_step": "Optimizer steps done, over all attempts",
    "qlora_steps_planned": "Optimizer steps of the whole job",
    "qlora_epoch": "Passes over the training rows, with fraction",
    "qlora_loss": "Mean training loss of the last step's target tokens, in nats",
    "qlora_eval_loss": "Mean loss of the evaluation rows' target tokens, in nats",
    "qlora_learning_rate": "Learning rate of the last step",
    "qlora_gradient_norm": "Global L2 norm of the gradient before clipping",
    "qlora_tokens_per_second": "Real tokens, no padding, trained on per second over all ranks",
    "qlora_restarts": "Attempts before this one that count against policy.maxRestarts",
}
COUNTERS = {
    "qlora_tokens": "Real tokens, no padding, that all ranks trained on in this attempt",
    "qlora_data_wait_seconds": "Time the rank waited for its next batch",
}
CPU_MEMORY = {
    "qlora_host_memory_resident_bytes": "Resident memory of the rank's process",
    "qlora_host_memory_available_bytes": "Memory the host can still give",
}
GPU_MEMORY = {
    "qlora_gpu_memory_allocated_bytes": "GPU memory held by tensors",
    "qlora_gpu_memory_reserved_bytes": "GPU memory held by PyTorch's allocator",
    "qlora_gpu_memory_peak_bytes": "Highest qlora_gpu_memory_allocated_bytes of this attempt",
    "qlora_gpu_memory_free_bytes": "Free memory of the device, by NVML",
    "qlora_gpu_memory_total_bytes": "Memory of the device, by NVML",
}


class Board:
    """The one place a rank writes its figures to."""

    def __init__(self, config: TrainerConfig, ranks: Ranks) -> None:
        self.registry = CollectorRegistry()
        self._labels = (config.job.name, config.job.namespace, str(ranks.rank))
        self._gauges = {n: self._make(Gauge, n, d) for n, d in GAUGES.items()}
        self._counters = {n: self._make(Counter, n, d) for n, d in COUNTERS.items()}
        self._step_seconds = self._make(
            Histogram, "qlora_step_seconds", "Time of an optimizer step", buckets=STEP_BUCKETS
        )
        self._component = Gauge(
            "qlora_memory_component_bytes",
            "Memory of this rank by what it is for; the components are those of status.memory",
            (*LABELS, "component"),
            registry=self.registry,
        )
        self._section = Counter(
            "qlora_section_seconds",
            "Time of this rank by section: Load, Data, Train, Evaluate, Checkpoint, Publish",
            (*LABELS, "section"),
            registry=self.registry,
        )
        self._watch_memory(ranks.device)
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._report = ProgressReport(
            job=config.job.name, attempt=config.attempt, section="Load", memory=Memory(), first_step=0
        )
        self.set("qlora_restarts", config.restarts)

    def _make(self, kind: Any, name: str, text: str, **more: Any) -> Any:
        return kind(name, text, LABELS, registry=self.registry, **more).labels(*self._labels)

    def _watch_memory(self, device: torch.device) -> None:
        process = psutil.Process()
        readers: dict[str, Callable[[], float]] = {
            "qlora_host_memory_resident_bytes": lambda: process.memory_info().rss,
            "qlora_host_memory_available_bytes": lambda: psutil.virtual_memory().available,
        }
        texts = dict(CPU_MEMORY)
        if device.type == "cuda":
            texts |= GPU_MEMORY
            readers |= _gpu_readers(device)
        for name, text in texts.items():
            self._make(Gauge, name, text).set_function(readers[name])

    def set(self, name: str, value: float) -> None:
        self._gauges[name].set(value)

    def add(self, name: str, value: float) -> None:
        self._counters[name].inc(value)

    def step_took(self, seconds: float) -> None:
        self._step_seconds.observe(seconds)

    def memory(self, components: dict[str, int]) -> None:
        """Show measured bytes by component, here and in the progress report."""
        for component, size in components.items():
            self._component.labels(*self._labels, component).set(size)
        known = {**self.report.memory.measured, **components}
        self.update(memory=Memory(measured=known))

    @contextmanager
    def section(self, name: Section) -> Iterator[None]:
        """Account the time within to a section; sections nest, and the outer one is shown again afterwards."""
        before = self.report.section
        self.update(section=name)
        start = time.monotonic()
        try:
            yield
        finally:
            self._section.labels(*self._labels, name).inc(time.monotonic() - start)
            self.update(section=before)

    def update(self, **changes: Any) -> None:
        """Change fields of the progress report."""
        with self._lock:
            self._report = self._report.model_copy(update=changes)

    @property
    def report(self) -> ProgressReport:
        with self._lock:
            return self._report.model_copy(update={"elapsed_seconds": round(time.monotonic() - self._started, 1)})


def _gpu_readers(device: torch.device) -> dict[str, Callable[[], float]]:
    pynvml.nvmlInit()
    # By UUID: NVML's index does not follow CUDA_VISIBLE_DEVICES.
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return {
        "qlora_gpu_memory_allocated_bytes": lambda: torch.cuda.memory_allocated(device),
        "qlora_gpu_memory_reserved_bytes": lambda: torch.cuda.memory_reserved(device),
        "qlora_gpu_memory_peak_bytes": lambda: torch.cuda.max_memory_allocated(device),
        "qlora_gpu_memory_free_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).free,
        "qlora_gpu_memory_total_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total,
    }


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The highest allocation so far: on a GPU of tensors, on a CPU of the whole process."""
    if device.type == "cuda":
        return {MemoryComponent.PEAK.value: torch.cuda.max_memory_allocated(device)}
    import resource  # noqa: PLC0415 not on every system

    return {MemoryComponent.PEAK.value: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 the base class names it so
        """Scrapes are not worth a line each."""


def serve(board: Board, host: str, port: int, port_file: Path | None) -> WSGIServer:
    """Serve ``/metrics``, ``/progress`` and ``/healthz`` from a daemon thread; port 0 takes any free one.

    Returns:
        The running server; ``shutdown`` ends it.

    """
    metrics = make_wsgi_app(board.registry)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        match environ["PATH_INFO"]:
            case "/metrics":
                return metrics(environ, start_response)
            case "/progress":
                start_response("200 OK", [("Content-Type", "application/json")])
                return [board.report.model_dump_json(by_alias=True, exclude_none=True).encode()]
            case "/healthz":
                start_response("200 OK", [("Content-Type", "text/plain")])
                return [b"ok\n"]
            case _:
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"there are /metrics, /progress and /healthz\n"]

    server = make_server(host, port, app, handler_class=_Quiet)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    if port_file is not None:
        port_file.parent.mkdir(parents=True, exist_ok=True)
        partial = port_file.with_suffix(".partial")
        partial.write_text(str(server.server_port))
        partial.rename(port_file)
    return server
