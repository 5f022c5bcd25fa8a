"""Summarize a sweep before it is created: trials, budget, and a plan of the template's job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_api.job import ObjectMeta, QLoRAJob
from qlora_api.sweep.sweep import QLoRASweep
from qlora_cli.memory_plan.cluster_plan import gpu_of_nodes, summary
from qlora_cli.sweeps import sweep_view
from qlora_cli.text import figures, units
from qlora_sweep.decide import total_trials
from qlora_sweep.halving import rungs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from qlora_api.sweep.spec import QLoRASweepSpec
    from qlora_cli.kube.api_client import Object


def sweep_summary(body: Object, gpu: str | None, labels: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Return what will be created of a sweep's manifest, as labels and values; memory and time are a trial's."""
    sweep = QLoRASweep.from_manifest(body)
    spec, name = sweep.spec, sweep.metadata.name
    template = QLoRAJob(metadata=ObjectMeta(name=name), spec=spec.template.spec)
    planned = (row for row in summary(template, gpu or gpu_of_nodes(labels, template)) if row[0] != "Job")
    return [("Sweep", name), *_trials(spec), *sweep_view.settings(spec), *planned]


def _trials(spec: QLoRASweepSpec) -> Iterator[tuple[str, str]]:
    total, parallelism = total_trials(spec), spec.template.spec.parallelism
    gpus = parallelism.workers * parallelism.gpus_per_worker
    at_once = min(spec.parallel_trials, total)
    held = figures.plural(at_once * gpus, "GPU")
    yield "Trials", f"at most {total}, {at_once} at a time on {held}{_steps(spec, total)}"
    budget = f"{spec.budget_gpu_hours} GPU-hours of all trials together" if spec.budget_gpu_hours else "none"
    yield "Budget", budget


def _steps(spec: QLoRASweepSpec, total: int) -> str:
    """Return how many steps early stopping leaves of those of all trials; empty where that is not known."""
    stopping, longest = spec.early_stopping, spec.template.spec.training.max_steps
    if stopping is None or longest is None:
        return ""
    left, done, steps = total, 0, 0
    for rung in rungs(stopping, total):
        reached = min(rung.step, longest)
        steps, left, done = steps + left * (reached - done), rung.survivors, reached
    steps += left * (longest - done)
    return f"; {units.number(steps)} of {units.number(total * longest)} steps, by early stopping"
