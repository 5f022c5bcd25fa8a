"""Cost of the command line: modules to start, work while 200 jobs are watched. Times: ``benchmarks/bench_cli.py``"""

import io
import json
import subprocess
import sys

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cli_builders import NOW, running
from qlora_cli.jobs import watch as watching
from qlora_cli.kube.api_client import Event
from testing.call_counts import calls_of

JOBS, MINUTE = 200, 60
EVENTS = JOBS * MINUTE // 15
"""In a minute: the operator writes a running job's status every 15 s."""
CALLS = 6_000_000
"""Maximum number of calls of Python and C functions; 4.2 million were counted."""


def test_a_minute_of_watching_200_jobs_takes_a_bounded_number_of_calls():
    names = [f"tune-{n:03d}" for n in range(JOBS)]
    board = watching.WatchedJobs()
    board.take(Event("LISTED", tuple(running(name) for name in names)))
    lines = [json.dumps({"type": "MODIFIED", "object": running(names[n % JOBS])}) for n in range(EVENTS)]
    screen = Console(file=io.StringIO(), force_terminal=True, width=200, height=60)

    def watch() -> None:
        with Live(Text(), console=screen, screen=True, auto_refresh=False) as live:
            for second in range(MINUTE):
                for line in lines[second * EVENTS // MINUTE : (second + 1) * EVENTS // MINUTE]:
                    event = json.loads(line)
                    board.take(Event(event["type"], (event["object"],)))
                live.update(Text("\n").join(watching.page(board, "all", NOW, 200, 60)), refresh=True)

    assert calls_of(watch) < CALLS


def test_help_loads_nothing_that_it_does_not_need():
    code = (
        "import sys; from qlora_cli.app import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'httpx', 'kubernetes', 'obstore', 'pydantic', 'rich', 'ssl', 'torch', 'yaml'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
