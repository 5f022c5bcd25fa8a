"""Draw pictures from real runs: make pictures, or tools/docs_pictures/pictures.py [dashboards] [report] [docs]

dashboards  of a training, an operator and a Prometheus that run for it, and what commands say of the same jobs, into
            docs/pictures. There is no GPU in them: panels that need one say so. About six minutes; needs root.
report      the page of a run: light, dark, narrow, and as it is printed. The run is the quickstart's (make run), which
            is made if it is not there, or the one that --run names.
docs        pages of the documents' site, and the pictures that they use, light and dark.

The last two are to be looked at: they are in build/pictures, and need Chromium. Without one, that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

from demo.live_metrics import NAME, OTHERS, TEAM, LiveMetrics  # noqa: E402
from docs_pictures import terminal  # noqa: E402 what is below needs the line above, and this stays beside it
from docs_pictures.chromium import Chromium, program  # noqa: E402
from docs_pictures.draw import NARROW, picture  # noqa: E402

PICTURES = REPOSITORY / "docs" / "pictures"
LOOKED_AT = REPOSITORY / "build" / "pictures"
SITE = REPOSITORY / "build" / "site"
DASHBOARDS = REPOSITORY / "charts" / "qlora-operator" / "dashboards"
PROGRAMS = Path(sys.executable).parent
SEEN_SECONDS = 150
STEPS = 1500
"""Steps of the training, which takes longer than ``SEEN_SECONDS``."""
A4 = 688
"""Pixels of a page between its margins."""
POINTS = 80
"""Number of points on a curve."""
SHOWN: dict[str, tuple[str, ...]] = {
    "fleet": (
        *("Now", "GPUs held", "GPUs waiting", "Running jobs", "Longest wait", "Effective GPU time", "Cost"),
        *("Unfinished jobs", "Queue", "GPUs held and waiting", "Longest wait by reason"),
        *("Jobs by state and reason", "Ends of attempts", "Attempts that ended", "Out of memory and stalled"),
        *("Cost by namespace", "GPU-hours"),
    ),
    "job": (
        *("Done", "Time left", "Loss", "Eval loss", "Attempt", "Gradient norm", "Tokens per second"),
        *("Time of a step", "Time by section", "Waiting for rows"),
    ),
    "memory": ("Predicted and measured", "Host memory of each rank"),
}
"""Dashboards, and the panels and rows of each."""
WIDTH = re.compile(r'<svg[^>]* width="([0-9.]+)"')
PAGES = ("index", "tutorials/first-run", "guides/monitoring", "reference/command-line")
"""Pages of the documentation site of which pictures are taken."""
PROMPTS = ("def read_text(self, encoding):", "def is_valid(self, name):", "class ServerError(Exception):")


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
        step = max(1.0, (self.until - self.since) / POINTS)
        times = {"start": f"{self.since:.3f}", "end": f"{self.until:.3f}", "step": f"{step:.3f}"}
        return list(self._get("query_range", expression, **times))

    def _get(self, what: str, expression: str, **times: str) -> Any:
        for name, value in self.variables.items():
            expression = expression.replace(name, value)
        return self.prometheus._get(what, query=expression, **times)["result"]


def dashboards() -> None:
    """The dashboards' queries, drawn; and what commands say of the same jobs."""
    with tempfile.TemporaryDirectory(prefix="qlora-pictures-") as folder:
        live = LiveMetrics(Path(folder), gpus=False, seen_seconds=SEEN_SECONDS, steps=STEPS)
        with live:
            here = {"KUBECONFIG": str(live.kubeconfig), "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
            watching = terminal.Session(["qlora", "watch", "-A"], here, height=14)

            def look() -> None:
                _write("watch", terminal.picture([("qlora watch -A", watching.interrupt())]))
                commands = (f"qlora show {NAME} -n {TEAM}", "qlora list -A")
                said = [(command, terminal.Session(command.split(), here).end()) for command in commands]
                _write("show", terminal.picture(said[:1]))
                _write("list", terminal.picture(said[1:]))

            live.play(look)
            since = live.began_at
            variables = {
                "$__rate_interval": "10s",
                "$__interval": "2s",
                "$__range": f"{live.ended_at - since:.0f}s",
                "$namespace": f"{TEAM}|{OTHERS}",
                "$job": NAME,
                "$price": "2.50",
            }
            asked = Asked(live.prometheus, since, live.ended_at, variables)
            for name, shown in SHOWN.items():
                board = json.loads((DASHBOARDS / f"{name}.json").read_text())
                _write(name, picture(board, asked, shown, NARROW))
                whole = LOOKED_AT / f"{name}-whole.svg"
                whole.parent.mkdir(parents=True, exist_ok=True)
                whole.write_text(picture(board, asked))


def report(run: Path) -> None:
    """The page of a run."""
    qlora = str(PROGRAMS / "qlora")
    if run == REPOSITORY / "runs" / "quickstart":
        subprocess.run(["make", "run"], cwd=REPOSITORY, check=True)
    asked = [f"--prompt={prompt}" for prompt in PROMPTS]
    ask = [qlora, "generate", "--run", run.name, "--runs-dir", run.parent, *asked, "--max-new-tokens=24"]
    subprocess.run(ask, check=True)
    page = LOOKED_AT / "report.html"
    subprocess.run([qlora, "report", run, "-o", page], check=True)

    def shoot(browser: Chromium) -> None:
        browser.shoot(page, LOOKED_AT / "report-light.png", 1240)
        browser.shoot(page, LOOKED_AT / "report-dark.png", 1240, dark=True)
        browser.shoot(page, LOOKED_AT / "report-narrow.png", 420)
        browser.shoot(page, LOOKED_AT / "report-paper.png", A4, media="print")
        browser.print_page(page, LOOKED_AT / "report.pdf")

    _by_chromium("the report", shoot)


def docs() -> None:
    """Pages of the site, and all pictures that the documents use."""
    subprocess.run(["make", "docs"], cwd=REPOSITORY, check=True)

    def shoot(browser: Chromium) -> None:
        for name in PAGES:
            place = LOOKED_AT / f"docs-{name.replace('/', '-')}.png"
            browser.shoot(SITE / f"{name}.html", place, 1280)
        browser.shoot(SITE / "index.html", LOOKED_AT / "docs-dark.png", 1280, dark=True)
        for path in (*sorted(PICTURES.glob("*.svg")), *sorted(LOOKED_AT.glob("*-whole.svg"))):
            width = round(float(WIDTH.search(path.read_text())[1]))
            for shade in ("light", "dark"):
                browser.shoot(path, LOOKED_AT / f"{path.stem}-{shade}.png", width, dark=shade == "dark")

    _by_chromium("pages and pictures", shoot)


def _by_chromium(what: str, shoot: Callable[[Chromium], None]) -> None:
    path = program()
    if path is None:
        print(f"No Chromium on PATH: no pictures of {what}.")
        return
    with Chromium(path) as browser:
        shoot(browser)
    print(f"{what}: {LOOKED_AT.relative_to(REPOSITORY)}")


def _write(name: str, drawn: str) -> None:
    path = PICTURES / f"{name}.svg"
    path.write_text(drawn)
    print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size / 1000:.0f} kB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=("dashboards", "report", "docs"), help="default: all")
    parser.add_argument("--run", type=Path, default=REPOSITORY / "runs" / "quickstart", help="of the report")
    arguments = parser.parse_args()
    makes = {"dashboards": dashboards, "report": lambda: report(arguments.run.absolute()), "docs": docs}
    for name in arguments.what or makes:
        makes[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
