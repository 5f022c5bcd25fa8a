"""Prepare a set of rows that is larger than the memory it may take: ``python benchmarks/bench_rows.py --gb 10``.

Rows are generated from the standard library's sources, about 2 kB each; the tokenizer is a byte-level BPE trained on
them, or with ``--words`` has a token for each word, which takes half the time. The process that prepares them has a
limit of memory (RLIMIT_DATA), and with ``--cgroup`` is in a memory cgroup that you made. Prints seconds, MB of rows a
second, and the peak of resident memory of the process and its children, mapped files included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_api.spec import DatasetSource, DatasetSpec, EvaluationData, ModelSpec, OutputSpec, QLoRAJobSpec, TrainingSpec
from qlora_trainer.prepare.tokenize_rows import prepare_data

GIB = 1 << 30
SAMPLE_SECONDS = 0.5


def texts() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text("utf-8", errors="replace") for path in sorted(library.glob("*.py"))]


def write_tokenizer(path: Path, *, words: bool) -> None:
    if words:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<eos>"))  # noqa: S106
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=8000, special_tokens=["<eos>"], show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)  # noqa: S106


def write_rows(path: Path, size: float) -> int:
    """Write lines until the file has ``size`` bytes; return their number."""
    sources = [text for text in texts() if len(text) > 4000]
    choose = random.Random(1)  # noqa: S311
    rows = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            for _ in range(1000):
                text = choose.choice(sources)
                start = choose.randrange(len(text) - 3000)
                length = choose.randrange(1000, 3000)
                prompt, completion = text[start : start + 200], text[start + 200 : start + length]
                file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
                rows += 1
    return rows


def prepare(folder: Path, limit: int) -> None:
    """Prepare the rows in this process, within ``limit`` bytes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    spec = QLoRAJobSpec(
        model=ModelSpec(source="base"),
        dataset=DatasetSpec(
            train=DatasetSource(source="rows"),
            eval=EvaluationData(fraction="0.01"),
            format="PromptCompletion",
            max_length=2048,
            long_rows="Truncate",
        ),
        training=TrainingSpec(epochs=1),
        output=OutputSpec(destination="out"),
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    before, cpu = time.monotonic(), time.process_time()
    path = folder / "rows.jsonl"
    data = prepare_data(spec, tokenizer, "benchmark", path, None, folder / "cache")
    seconds, megabytes = time.monotonic() - before, path.stat().st_size / 1e6
    cores = len(os.sched_getaffinity(0))
    found = {
        "rows": data.receipt.train_rows + data.receipt.eval_rows,
        "tokens": data.receipt.train_tokens + data.receipt.eval_tokens,
        "MB": round(megabytes),
        "seconds": round(seconds, 1),
        "MB/s": round(megabytes / seconds, 2),
        "MB/s per CPU second": round(megabytes / (time.process_time() - cpu), 2),
        "cores": cores,
        "limit MiB": limit >> 20,
    }
    print(json.dumps(found))


def run_and_watch(command: list[str], cgroup: Path | None) -> int:
    """Run a command and return the peak of the resident memory of its processes, in MiB."""
    peak = 0
    process = psutil.Popen(command)
    if cgroup:
        (cgroup / "cgroup.procs").write_text(str(process.pid))
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = [process, *process.children(recursive=True)]
            peak = max(peak, sum(each.memory_info().rss for each in tree))
        with contextlib.suppress(psutil.TimeoutExpired):
            if code := process.wait(SAMPLE_SECONDS):
                raise SystemExit(code)
            return peak >> 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=10)
    parser.add_argument("--limit-gib", type=float, default=2)
    parser.add_argument("--words", action="store_true", help="take a tokenizer of words")
    parser.add_argument("--folder", type=Path, help="prepare what is in it; for the process that has the limit")
    parser.add_argument("--cgroup", type=Path, help="folder of a memory cgroup to prepare the rows in")
    options = parser.parse_args()
    limit = int(options.limit_gib * GIB)
    if options.folder:
        prepare(options.folder, limit)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_tokenizer(folder / "tokenizer", words=options.words)
        write_rows(folder / "rows.jsonl", options.gb * 1e9)
        command = [sys.executable, __file__, "--folder", made, "--limit-gib", str(options.limit_gib)]
        print(json.dumps({"peak MiB": run_and_watch(command, options.cgroup)}))


if __name__ == "__main__":
    main()
