"""Pictures for the documents, from a real training, operator and Prometheus on this machine: make pictures

There is no GPU in them: panels that need one say so. Takes about four minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "observability"), str(REPOSITORY / "tests")]

from draw import picture  # noqa: E402 found by the line above
from observability.live.stage import NAME, OTHERS, TEAM, Stage  # noqa: E402

PICTURES = REPOSITORY / "docs" / "pictures"
DASHBOARDS = REPOSITORY / "charts" / "qlora-operator" / "dashboards"
SEEN_SECONDS = 120
STEPS = 80
"""Points of a curve."""
SHOWN: dict[str, tuple[str, ...]] = {
    "fleet": (),
    "job": (
        *("Loss", "Gradient norm", "Tokens per second", "Time of a step", "Time by section", "Waiting for rows"),
        *("Done", "Time left", "Eval loss", "Attempt"),
    ),
    "memory": ("Predicted and measured", "Host memory of each rank"),
}
"""Dashboards, and the panels of each; none: all."""


@dataclass(frozen=True)
class Asked:
    """A Prometheus, asked about a time that is over."""

    prometheus: Any
    since: float
    until: float
    variables: dict[str, str]

    def now(self, expression: str) -> list[dict[str, Any]]:
        return list(self._get("query", expression, time=f"{self.until:.3f}"))

    def over_time(self, expression: str) -> list[dict[str, Any]]:
        step = max(1.0, (self.until - self.since) / STEPS)
        times = {"start": f"{self.since:.3f}", "end": f"{self.until:.3f}", "step": f"{step:.3f}"}
        return list(self._get("query_range", expression, **times))

    def _get(self, what: str, expression: str, **times: str) -> Any:
        for name, value in self.variables.items():
            expression = expression.replace(name, value)
        return self.prometheus._get(what, query=expression, **times)["result"]  # noqa: SLF001 ours, in tests


def main() -> int:
    only = sys.argv[1:] or list(SHOWN)
    with tempfile.TemporaryDirectory(prefix="qlora-pictures-") as folder:
        stage = Stage(Path(folder), gpus=False, seen_seconds=SEEN_SECONDS)
        with stage:
            stage.play()
            since = stage.began_at - 15
            span = round(stage.ended_at - since)
            variables = {
                "$__rate_interval": "15s",
                "$__interval": "2s",
                "$__range": f"{span}s",
                "$namespace": f"{TEAM}|{OTHERS}",
                "$job": NAME,
                "$price": "2.50",
            }
            asked = Asked(stage.prometheus, since, stage.ended_at, variables)
            PICTURES.mkdir(parents=True, exist_ok=True)
            for name in only:
                board = json.loads((DASHBOARDS / f"{name}.json").read_text())
                path = PICTURES / f"{name}.svg"
                path.write_text(picture(board, asked, SHOWN[name]))
                print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
