"""Show a rank to the outside: Prometheus metrics on ``/metrics``, and on ``/progress`` the state as JSON.

Names, texts and labels are the catalogue's (``qlora_api.metrics_catalogue``). Gauges of memory are read when they are
scraped, not when a step ends.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIServer

import psutil
import pynvml
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, make_wsgi_app

from qlora_api.contract import ProgressReport, RankActivity, SectionProgress, TrainerConfig
from qlora_api.metrics_catalogue import TRAINER, Metric, MetricKind
from qlora_api.status import Memory, MemoryComponent
from qlora_memory.gpus import known_gpu
from qlora_trainer.liveness import heartbeat
from qlora_trainer.liveness.heartbeat import node_name
from qlora_trainer.liveness.watchdog import waited_for
from qlora_trainer.ranks import Ranks
from qlora_trainer.reporting.http_server import start_server
from qlora_trainer.reporting.phase_collector import PhaseCollector
from qlora_trainer.tracking.journal import tracking_folder
from qlora_trainer.tracking.tracked_runs import read_runs

log = logging.getLogger(__name__)

T = TypeVar("T")
_SECTIONS = "qlora_section_seconds"
_KINDS: dict[MetricKind, Any] = {MetricKind.GAUGE: Gauge, MetricKind.COUNTER: Counter, MetricKind.HISTOGRAM: Histogram}
_PCIE = {"receive": "NVML_PCIE_UTIL_RX_BYTES", "transmit": "NVML_PCIE_UTIL_TX_BYTES"}


class MetricsRecorder:
    """The one place a rank writes its figures to. What is not known yet is not served."""

    def __init__(self, config: TrainerConfig, ranks: Ranks) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # series of the library, which nobody reads
        self.registry = CollectorRegistry()
        self._labels = (config.job.name, config.job.namespace, str(ranks.rank))
        on_gpu = ranks.device.type == "cuda"
        self.device = torch.cuda.get_device_name(ranks.device) if on_gpu else "CPU"
        """Name of the rank's device, as the driver gives it."""
        self._metrics = {
            m.name: _make(m, self.registry) for m in TRAINER.values() if m.name != _SECTIONS and (on_gpu or not m.gpu)
        }
        self.registry.register(PhaseCollector(TRAINER[_SECTIONS], self._labels, ranks.heartbeat))
        self._ranks = ranks
        self._read("qlora_heartbeat_timestamp_seconds", lambda: ranks.heartbeat.wall)
        self._watch_memory(ranks.device)
        self._lock = threading.Lock()
        self._stage_since = time.monotonic()
        self._report = ProgressReport(
            job=config.job.name, attempt=config.attempt, section="Load", memory=Memory(), first_step=0
        )
        self.set("qlora_attempt", config.attempt)
        self.set("qlora_restarts", config.restarts)
        for name in ("qlora_tokens", "qlora_data_wait_seconds"):
            self.add(name, 0)

    def set(self, name: str, value: float, *more: str) -> None:
        """Set a gauge; ``more`` are the values of its labels after the rank."""
        self._metrics[name].labels(*self._labels, *more).set(value)

    def add(self, name: str, value: float) -> None:
        self._metrics[name].labels(*self._labels).inc(value)

    def step_took(self, seconds: float) -> None:
        self._metrics["qlora_step_seconds"].labels(*self._labels).observe(seconds)
        self.update(longest_step_seconds=max(round(seconds, 3), self.report.longest_step_seconds))

    def save_took(self, seconds: float) -> None:
        self.update(longest_save_seconds=max(round(seconds, 3), self.report.longest_save_seconds))

    def predict(self, components: dict[str, int]) -> None:
        """Show predicted bytes by component, beside which the measured ones will stand."""
        for component, size in components.items():
            self.set("qlora_memory_predicted_bytes", size, component)
        self.update(memory=self.report.memory.model_copy(update={"predicted": components}))

    def memory(self, components: dict[str, int]) -> None:
        """Show measured bytes by component, here and in the progress report."""
        for component, size in components.items():
            self.set("qlora_memory_component_bytes", size, component)
        before = self.report.memory
        known = {**before.measured, **components}
        self.update(memory=before.model_copy(update={"measured": known}))

    def warn(self, text: str) -> None:
        """Log a warning, and show it to whoever watches the attempt."""
        log.warning("%s", text)
        self.update(warnings=[*self.report.warnings, text])

    def stage(self, name: str) -> None:
        """Log a part of Load that begins, and show it to whoever watches the attempt."""
        if self._ranks.is_first:
            log.info("stage: %s", name)
        self._stage_since = time.monotonic()
        self.update(stage=name)

    def count(self, items: Iterable[T], total: int, unit: str) -> Iterator[T]:
        """Yield items, and show how many of them are done; ``unit`` says what they are."""
        start = time.monotonic()
        try:
            for done, item in enumerate(items):
                seconds = round(time.monotonic() - start, 3)
                self.update(section_progress=SectionProgress(unit=unit, done=done, total=total, seconds=seconds))
                yield item
        finally:
            self.update(section_progress=None)

    def waiting_for(self) -> RankActivity | None:
        """The rank of this pod that the others wait for just now."""
        folder = os.environ.get(heartbeat.ENVIRONMENT)
        beats = heartbeat.read_all(Path(folder)) if folder else []
        late = waited_for(beats)
        if late is None:
            return None
        beat = beats[late]
        rank = self._ranks.rank - self._ranks.local_rank + late
        seconds = round(time.monotonic() - beat.at, 3)
        return RankActivity(rank=rank, node=node_name(), section=beat.section.title, seconds=seconds)

    def update(self, **changes: Any) -> None:
        """Change fields of the progress report."""
        with self._lock:
            self._report = self._report.model_copy(update=changes)

    @property
    def report(self) -> ProgressReport:
        with self._lock:
            report = self._report
        seconds = self._ranks.heartbeat.phase_seconds()
        section, in_section = self._ranks.heartbeat.phase, self._ranks.heartbeat.seconds_in_phase
        stage = report.stage if section == "Load" else None
        return report.model_copy(
            update={
                "section": section,
                "stage": stage,
                "stage_seconds": round(time.monotonic() - self._stage_since if stage else in_section, 1),
                "elapsed_seconds": round(sum(seconds.values()), 1),
                "section_seconds": {phase: round(spent, 1) for phase, spent in seconds.items()},
            }
        )

    def _watch_memory(self, device: torch.device) -> None:
        process = psutil.Process()
        self._read("qlora_host_memory_resident_bytes", lambda: process.memory_info().rss)
        self._read("qlora_host_memory_available_bytes", lambda: psutil.virtual_memory().available)
        if device.type == "cuda":
            self._watch_gpu(device)
        else:
            self.set("qlora_device_info", 1, self.device, "")

    def _watch_gpu(self, device: torch.device) -> None:
        pynvml.nvmlInit()
        # By UUID: NVML's index does not follow CUDA_VISIBLE_DEVICES.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self.set("qlora_device_info", 1, self.device, uuid)
        if known := known_gpu(self.device):
            self.set("qlora_device_peak_flops_per_second", known.tflops * 1e12)
        self._read("qlora_gpu_memory_allocated_bytes", lambda: torch.cuda.memory_allocated(device))
        self._read("qlora_gpu_memory_reserved_bytes", lambda: torch.cuda.memory_reserved(device))
        self._read("qlora_gpu_memory_peak_bytes", lambda: torch.cuda.max_memory_allocated(device))
        self._read("qlora_gpu_memory_free_bytes", lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).free)
        self._read("qlora_gpu_memory_total_bytes", lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        for direction, counter in _PCIE.items():
            reader = partial(_pcie_bytes, handle, getattr(pynvml, counter))
            if not math.isnan(reader()):  # not every driver and virtual machine tells
                self._read("qlora_gpu_pcie_bytes_per_second", reader, direction)

    def _read(self, name: str, reader: Callable[[], float], *more: str) -> None:
        """Ask for a gauge's value whenever it is scraped."""
        self._metrics[name].labels(*self._labels, *more).set_function(reader)


def _make(metric: Metric, registry: CollectorRegistry) -> Any:
    more = {"buckets": metric.buckets} if metric.kind is MetricKind.HISTOGRAM else {}
    return _KINDS[metric.kind](metric.name, metric.meaning, metric.labels, registry=registry, **more)


def _pcie_bytes(handle: Any, counter: int) -> float:
    """NVML counts over 20 ms, in KiB a second."""
    try:
        return float(pynvml.nvmlDeviceGetPcieThroughput(handle, counter)) * 1024
    except pynvml.NVMLError:
        return math.nan


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The highest allocation so far: on a GPU of tensors, on a CPU of the whole process."""
    if device.type == "cuda":
        return {MemoryComponent.PEAK.value: torch.cuda.max_memory_allocated(device)}
    import resource  # noqa: PLC0415 not on every system

    return {MemoryComponent.PEAK.value: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def serve(recorder: MetricsRecorder, host: str, port: int, port_file: Path | None) -> WSGIServer:
    """Serve ``/metrics``, ``/progress`` and ``/healthz`` from a daemon thread; port 0 takes any free one.

    Args:
        recorder: of what is served.
        host: address to listen on; empty: all, of IPv4 and IPv6.
        port: to listen on.
        port_file: gets the port, once it is open.

    Returns:
        The running server; ``shutdown`` ends it.

    """
    metrics = make_wsgi_app(recorder.registry)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        match environ["PATH_INFO"]:
            case "/metrics":
                return metrics(environ, start_response)
            case "/progress":
                start_response("200 OK", [("Content-Type", "application/json")])
                folder = tracking_folder()
                tracking = read_runs(folder) if folder is not None else []
                report = recorder.report.model_copy(
                    update={"waiting_for": recorder.waiting_for(), "tracking": tracking}
                )
                return [report.model_dump_json(by_alias=True, exclude_none=True).encode()]
            case "/healthz":
                start_response("200 OK", [("Content-Type", "text/plain")])
                return [b"ok\n"]
            case _:
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"there are /metrics, /progress and /healthz\n"]

    server = start_server(app, host, port)
    if port_file is not None:
        port_file.parent.mkdir(parents=True, exist_ok=True)
        partial = port_file.with_suffix(".partial")
        partial.write_text(str(server.server_port))
        partial.rename(port_file)
    return server
