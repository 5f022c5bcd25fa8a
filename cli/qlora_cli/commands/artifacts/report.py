"""The command ``qlora report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_on_user_error, exit_with_code
from qlora_cli.kube.target import SWEEP_REFERENCES, Target, connect
from qlora_cli.text.printable import write_line

if TYPE_CHECKING:
    from rich.console import RenderableType

ReportOf = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Name or folder of a local run or sweep, folder of a published adapter, or name of a cluster's sweep.",
    ),
]


ReportFile = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--out",
        metavar="FILE",
        help="File to write; default: report.html in the folder of the run, NAME-report.html of a cluster's sweep.",
        parser=o.to_path,
    ),
]


def report(
    run: ReportOf,
    out: ReportFile = None,
    *,
    runs_dir: o.RunsDir = Path("runs"),
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Write an HTML report of a run or sweep on one page.

    Shows loss curves, memory, data, attempts and configuration. RUN is a local run, finished or not, or a published
    adapter. For a sweep it shows trials, important parameters and cost, prints these tables, and also writes the
    figures as JSON. A name without a run on this machine is that of a sweep in the cluster; qlorasweep/NAME is always
    one.
    """
    with exit_on_user_error():
        from qlora_cli.report.write import PAGE, write
        from qlora_cli.report.write_sweep import find_sweep, write_sweep

        target = Target(kubeconfig, context, namespace)
        if _is_in_cluster(run, runs_dir, target):
            _report_of_cluster(run, out, target)
            return
        if (sweep := find_sweep(run, runs_dir)) is None:
            write_line(write(run, runs_dir, out))
            return
        page = out or sweep.path / PAGE
        _print_sweep(page, *write_sweep(sweep, page))


def _is_in_cluster(run: str, runs_dir: Path, target: Target) -> bool:
    """Return whether a reference can only be that of a sweep in a cluster."""
    from qlora_cli.kube import kubeconfig
    from qlora_cli.kube.names import is_name

    if run.startswith(SWEEP_REFERENCES) or target != Target():
        return True
    here = any(place.exists() for place in (runs_dir / run, Path(run)))
    return is_name(run) and not here and kubeconfig.is_configured()


def _report_of_cluster(run: str, out: Path | None, target: Target) -> None:
    with exit_with_code():
        from qlora_cli.cluster_sweeps.report_sweep import write_report
        from qlora_cli.kube.target import get_sweep

        with connect(target) as cluster:
            body = get_sweep(cluster, run)
            page = out or Path(f"{body['metadata']['name']}-report.html")
            figures, summary = write_report(cluster, body, page)
        _print_sweep(page, figures, summary)


def _print_sweep(page: Path, figures: Path, summary: RenderableType) -> None:
    from qlora_cli.text.output import console

    console().print(summary, crop=False)
    write_line(f"{page}\n{figures}")
