"""A base's tokenizer that takes exponential time or memory ends Prepare within its bounds, as an error of the base."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from qlora_api.contract import ExitCode

CHILD = """
import runpy, sys
from qlora_trainer.model import tokenizer
tokenizer.Bounds.__init__.__defaults__ = (4.0, 1 << 28)
sys.argv[1:] = sys.argv[-1:]
runpy.run_module("qlora_trainer.prepare.child", run_name="__main__")
"""


def split(pattern):
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TOKENIZERS = {
    # below the number of tries at which the library itself gives up, and so at every word again
    "slow-expression": (split("(a|aa)+c"), ["takes too much processor time"]),
    "expression-that-panics": (split("(a+)+b"), ["whose library fails on a text", "takes too much processor time"]),
    "growing-text": ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}}, ["takes too much memory"]),
    "expression-that-is-none": (split("(a"), ["has a tokenizer that cannot be loaded"]),
}
WORDS = {"expression-that-panics": "a" * 60}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_without_bounds_ends_prepare_as_the_bases_error(runner, kind, tmp_path):
    parts, expected = TOKENIZERS[kind]
    base = shutil.copytree(runner.model, runner.folder / "model")
    file = base / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    rows = runner.folder / "rows.jsonl"
    row = {"prompt": "say", "completion": " ".join([WORDS.get(kind, "a" * 30)] * 2000)}
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{CHILD}' \"$@\"\n")
    python.chmod(0o755)
    config = runner.config(
        model={"source": str(base)}, dataset={"train": {"source": str(rows)}, "longRows": "Truncate"}
    )
    path, log = runner.write(config)
    start = "runpy.run_module('qlora_trainer.prepare', run_name='__main__')"
    program = f"import runpy, sys; sys.executable = {str(python)!r}; {start}"
    with log.open("ab") as out:
        command = [sys.executable, "-c", program, str(path)]
        code = subprocess.run(command, stdout=out, stderr=out, env=os.environ, check=False).returncode
    ended = runner.ended(config, code)
    assert ended.code == ExitCode.USER_ERROR, ended.log[-3000:]
    assert ended.text.startswith("spec.model.source: ")
    assert any(part in ended.text for part in expected), ended.text
    assert "aaa" not in ended.text
