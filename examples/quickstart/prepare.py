"""Make the quickstart's base and rows on this machine: nothing is fetched.

    python examples/quickstart/prepare.py --out runs/quickstart-data

OUT holds ``base/`` (a model of a few million parameters and its tokenizer, in the layout of a hub repository),
``train.jsonl``, ``eval.jsonl`` (held-out modules), and ``about.json`` (what was made, from what, in what time).

The result is kept under ``$QLORA_CACHE/quickstart`` (default ``~/.cache/qlora-operator``), by the hash of all that it
is made from; the next call copies it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdlib_rows import Module, Row, extract, pretraining_texts, read_modules, source_files

from qlora_trainer.allocator import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

ABOUT = "about.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's base model and rows.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    out: Path = parser.parse_args().out
    keep_freed_memory()
    # Threads that wait for each other spin, and on a machine with other work that takes five times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # OpenMP reads it when torch is imported
    import torch

    from qlora_trainer.model.device.hardware import fast_dtype

    dtype = fast_dtype(torch.device("cpu"))
    key = content_key(source_files(), str(dtype))
    kept = cache_dir() / key
    if not (kept / ABOUT).exists():
        build_into(kept, dtype)
    place(kept, out)
    print(summary(out))


def cache_dir() -> Path:
    """As ``qlora run`` has it."""
    named = os.environ.get("QLORA_CACHE")
    return (Path(named).expanduser() if named else Path.home() / ".cache" / "qlora-operator") / "quickstart"


def content_key(files: Sequence[Path], dtype: str) -> str:
    """Hash of all that decides the result: the sources read, these scripts, the libraries, the type computed in."""
    digest = hashlib.sha256(f"{platform.python_version()} {dtype}\n".encode())
    for package in ("tokenizers", "torch", "transformers"):
        digest.update(f"{package}={version(package)}\n".encode())
    for path in (*files, *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def build_into(target: Path, dtype: torch.dtype) -> None:
    """Make everything beside ``target`` and rename it when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as temporary:
        work = Path(temporary) / "data"
        work.mkdir()
        build(work, dtype)
        if not (target / ABOUT).exists():  # another call may have been faster
            work.rename(target)


def build(work: Path, dtype: torch.dtype) -> None:
    start = time.monotonic()
    say(f"Reading the standard library of Python {platform.python_version()}")
    modules = read_modules()
    rows = extract(modules)
    write_rows(work / "train.jsonl", rows.train)
    write_rows(work / "eval.jsonl", rows.eval)
    say(f"  {len(modules)} modules, {len(rows.train)} training rows, {len(rows.eval)} held-out rows")
    made = make_base(modules, work / "base", dtype)
    about = {
        "python": platform.python_version(),
        "modules": len(modules),
        "heldOutModules": sum(m.held_out for m in modules),
        "trainRows": len(rows.train),
        "evalRows": len(rows.eval),
        **made,
        "seconds": round(time.monotonic() - start, 1),
    }
    (work / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def make_base(modules: Sequence[Module], folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Train tokenizer and base on what is not held out, and save them as a hub repository would hold them."""
    import small_base
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # DeepSpeed's, which transformers imports to save, of this machine's accelerators
    recipe = small_base.Recipe()
    say("Training a tokenizer")
    texts = pretraining_texts(modules)
    tokenizer = small_base.train_tokenizer(texts, recipe.vocabulary)
    blocks = small_base.token_blocks(tokenizer, texts, recipe)
    model = small_base.make_model(tokenizer, recipe)
    parameters = sum(p.numel() for p in model.parameters())
    kind = str(dtype).removeprefix("torch.")
    say(f"Training a base of {parameters / 1e6:.1f}M parameters from scratch in {kind}, {recipe.steps} steps")
    start = time.monotonic()
    loss = small_base.train_base(model, blocks, recipe, dtype, say)
    seconds = time.monotonic() - start
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "parameters": parameters,
        "computeType": kind,
        "pretrainingTokens": recipe.steps * recipe.batch * recipe.length,
        "pretrainingLoss": round(loss, 4),
        "pretrainingSeconds": round(seconds, 1),
    }


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": r.prompt, "completion": r.completion}) + "\n" for r in rows)


def place(kept: Path, out: Path) -> None:
    """Copy what is kept to where the manifest looks for it."""
    if (out / ABOUT).exists() and (out / ABOUT).read_bytes() == (kept / ABOUT).read_bytes():
        return
    if out.exists() and not (out / ABOUT).exists():
        sys.exit(f"{out} exists and was not made by this script; choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(kept, partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)  # all of it or nothing, whenever Ctrl-C comes


def summary(out: Path) -> str:
    about = json.loads((out / ABOUT).read_text())
    return (
        f"{out}: a base of {about['parameters'] / 1e6:.1f}M parameters (made in {about['seconds']:.0f} s),"
        f" {about['trainRows']} training rows, {about['evalRows']} held-out rows"
    )


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
