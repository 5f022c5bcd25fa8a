"""Write the report of a cluster's sweep, as for one on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_cli.cluster_sweeps.sweep_reader import read_trials
from qlora_cli.kube.errors import ClusterError
from qlora_cli.report.sweep_figures import TrialHistory, sweep_figures
from qlora_cli.report.write_sweep import write_figures

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from qlora_cli.cluster_sweeps.sweep_reader import SweepTrials
    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster
    from qlora_cli.report.sweep_figures import SweepFigures

GPU_HOURS = "GPU-hours"
"""Unit of time on a cluster; an operator that trains on CPUs counts ranks."""


def write_report(cluster: Cluster, body: Object, out: Path) -> tuple[Path, RenderableType]:
    """Write page and figures; return where the figures are, and what to print.

    Raises:
        ClusterError: the trials may not be read, or there is none yet.
        RunError: the figures would take the place of the page or of another file.

    """
    found = read_trials(cluster, body)
    if not found.trials:
        raise ClusterError(f'sweep "{body["metadata"]["name"]}" has no trial yet')
    return write_figures(figures_of(found), found.sweep.spec, GPU_HOURS, out)


def figures_of(found: SweepTrials) -> SweepFigures:
    """Return the figures of a cluster's sweep, over or not."""
    meta = found.sweep.metadata
    histories = [TrialHistory(t, values) for t, values in zip(found.trials, found.values, strict=True)]
    return sweep_figures(meta.name, meta.uid or "", found.sweep.spec, histories)
