"""Measure hashing a base and merging an adapter into it: ``python benchmarks/bench_base.py``

Hashes the weights of random Llamas in bf16 as Prepare does, and merges an adapter of all linear layers into them as
``qlora merge`` does: seconds, the peak memory of the process, and the bytes on disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_trainer.storage.base_folder import private_folder

LAYER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8}
VOCABULARY = 32_000
RANK = 16
SHARD = "1GB"
END = "<eos>"
SAMPLE_SECONDS = 0.05
COLUMNS = (
    *("base, GB", "hashed, MB/s", "again, s", "merge, s", "merge, CPU s"),
    *("peak memory, GB", "anonymous, GB", "merged, GB"),
)


@dataclass(frozen=True)
class Measured:
    """One base."""

    base_bytes: int
    hash_seconds: float
    again_seconds: float
    """Seconds of hashing the same files a second time, with their hashes remembered."""
    merge_seconds: float
    merge_cpu_seconds: float
    peak_bytes: int
    """Resident memory, mapped weight files included."""
    anonymous_bytes: int
    """Largest anonymous memory: the part of the resident memory that is not a mapped file."""
    merged_bytes: int

    def cells(self) -> list[str]:
        """Return the figures of the table's columns."""
        rate = self.base_bytes / self.hash_seconds / 1e6
        seconds = (self.again_seconds, self.merge_seconds, self.merge_cpu_seconds)
        sizes = (self.peak_bytes, self.anonymous_bytes, self.merged_bytes)
        figures = [f"{rate:,.0f}", *(f"{value:.1f}" for value in seconds), *(f"{size / 1e9:.2f}" for size in sizes)]
        return [f"{self.base_bytes / 1e9:.2f}", *figures]


def write_base(folder: Path, layers: int) -> None:
    """Write a base of random weights, and an adapter of it beside."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **LAYER)).bfloat16()
    model.save_pretrained(folder / "base", max_shard_size=SHARD)
    tokenizer = Tokenizer(models.WordLevel({END: 0}, unk_token=END))
    adapter = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    adapter.save_pretrained(folder / "adapter", save_embedding_layers=False)
    for place in ("base", "adapter"):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder / place)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def anonymous_memory(pid: int) -> int:
    """Return bytes; none of a process that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def seconds_of_hashing(folder: Path) -> float:
    start = time.perf_counter()
    private_folder(folder / "base", folder / "cache")
    return time.perf_counter() - start


def measure(folder: Path, layers: int) -> Measured:
    """Measure one base. It is written by a process of its own, so that this one's memory is not the merge's."""
    subprocess.run([sys.executable, __file__, "--write", str(folder), "--layers", str(layers)], check=True)
    (folder / "cache").mkdir()
    time.sleep(3)  # hashes of files that have just changed are not remembered
    hashed, again = seconds_of_hashing(folder), seconds_of_hashing(folder)
    (folder / "merged").mkdir()
    words = [f"--{name}={folder / name}" for name in ("base", "adapter")]
    words += [f"--out={folder / 'merged'}", f"--cache-dir={folder / 'cache'}"]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "qlora_trainer.merge", *words])
    anonymous = 0
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        anonymous = max(anonymous, anonymous_memory(process.pid))
        time.sleep(SAMPLE_SECONDS)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return Measured(
        base_bytes=size_of(folder / "base"),
        hash_seconds=hashed,
        again_seconds=again,
        merge_seconds=time.perf_counter() - start,
        merge_cpu_seconds=usage.ru_utime + usage.ru_stime,
        anonymous_bytes=anonymous,
        peak_bytes=usage.ru_maxrss * 1024,
        merged_bytes=size_of(folder / "merged"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 6, 24], help="of the bases")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_base(arguments.write, arguments.layers[0])
        return
    print(f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}", sep="\n")
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as name:
            found = measure(Path(name), layers)
        print(f"| {' | '.join(found.cells())} |", flush=True)


if __name__ == "__main__":
    main()
