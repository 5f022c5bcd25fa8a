"""Run all language models of the installed transformers at toy size, and write docs/reference/models.md: make models

python tools/models                      all types that build/models/results.jsonl does not have
python tools/models --types llama,gemma  these, anew
python tools/models --page               the page alone, from the results
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from models.page import page  # noqa: E402
from testing.forks import READ_WHEN_IMPORTED, fork_context  # noqa: E402

RESULTS = ROOT / "build/models/results.jsonl"
PAGE = ROOT / "docs/reference/models.md"
SECONDS = 600


def run(types: list[str], workers: int) -> None:
    """Try types, ``workers`` at a time, each in a process forked from one that has imported everything."""
    from models.one_type import CRASHED, TypeResult, run_type
    from models.tiny_base import write_rows, write_tokenizer

    context = fork_context()
    with tempfile.TemporaryDirectory(prefix="models-") as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        write_rows(folder / "rows.jsonl")
        waiting, running = list(types), {}
        while waiting or running:
            while waiting and len(running) < workers:
                model_type = waiting.pop(0)
                out = folder / model_type
                arguments = (model_type, str(folder / "tokenizer"), str(folder / "rows.jsonl"), str(out))
                process = context.Process(target=run_type, args=arguments)
                process.start()
                running[model_type] = (process, time.monotonic(), out)
            time.sleep(0.1)
            for model_type, (process, began, out) in list(running.items()):
                seconds = time.monotonic() - began
                if process.is_alive() and seconds < SECONDS:
                    continue
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                process.join()
                del running[model_type]
                code = process.exitcode
                lost = TypeResult(model_type, CRASHED, "process", f"ended with {code} after {seconds:.0f} s")
                text = out.read_text() if out.exists() else lost.to_json()
                keep(json.loads(text) | {"seconds": round(seconds, 1)})


def keep(result: dict) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{result['type']:28} {result['outcome']:12} {result['seconds']:5} s  {result['sentence'][:200]}", flush=True)


def results() -> dict[str, dict]:
    """Return the newest result of each type."""
    if not RESULTS.exists():
        return {}
    return {found["type"]: found for found in map(json.loads, RESULTS.read_text().splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", help="comma-separated; anew")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(READ_WHEN_IMPORTED)
    if not options.page:
        from models.tiny_base import all_types

        known = results()
        run(options.types.split(",") if options.types else [t for t in all_types() if t not in known], options.workers)
    PAGE.write_text(page(list(results().values())))


if __name__ == "__main__":
    main()
