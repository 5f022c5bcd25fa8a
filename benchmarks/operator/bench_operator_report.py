"""Tables of the figures of ``bench_operator.py``: ``python benchmarks/operator/bench_operator_report.py FIGURES``"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OPERATOR = "qlora-operator"
ROWS = (
    ("all child Jobs exist, s", "children_seconds", ".1f"),
    ("all Succeeded, s", "succeeded_seconds", ".1f"),
    ("created → child Job p50, s", "child_p50_seconds", ".2f"),
    ("created → child Job p99, s", "child_p99_seconds", ".2f"),
    ("operator memory, peak, MB", "memory_peak_mb", ".0f"),
    ("operator memory, after, MB", "memory_after_mb", ".0f"),
    ("CPU s of everything else on the machine", "others_cpu", ".0f"),
)


def tables(report: Mapping[str, Any]) -> str:
    """Markdown: a column for each load, then a row for each restart."""
    loads: Sequence[Mapping[str, Any]] = report["loads"]
    lines: list[str] = []
    if loads:
        lines += _row("", [load["name"] for load in loads]) + _row("---", ["---"] * len(loads))
        for words, name, form in ROWS:
            lines += _row(words, [format(load[name], form) for load in loads])
        for process in loads[0]["cpu"]:
            lines += _row(f"CPU s, {process}", [f"{load['cpu'][process]:.1f}" for load in loads])
        for words, name in (("writes per job", "writes"), ("own writes per job", "operator_writes")):
            for kind in dict.fromkeys(kind for load in loads for kind in load[name]):
                lines += _row(f"{words}, {kind}", [f"{load[name].get(kind, 0):.2f}" for load in loads])
    if report["restarts"]:
        names = ("jobs", "writes", "quiet after, s", "CPU s", "memory peak, MB", "memory after, MB")
        lines += ["", *_row("restart", names), *_row("---", ["---"] * len(names))]
        for r in report["restarts"]:
            figures = (f"{r['jobs']:,}", r["writes"], f"{r['quiet_seconds']:.1f}", f"{r['cpu_seconds']:.2f}")
            lines += _row("", [*map(str, figures), f"{r['memory_peak_mb']:.0f}", f"{r['memory_after_mb']:.0f}"])
    return "\n".join(lines)


def _row(first: str, cells: Sequence[str]) -> list[str]:
    return [f"| {first} | {' | '.join(cells)} |"]


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
