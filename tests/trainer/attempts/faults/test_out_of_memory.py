"""``qlora run`` in a cgroup whose memory the first plan overruns: the kernel kills, and the run ends well by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.ranks

LIMIT_BYTES = 5600 << 20
"""Measured: 2 GiB for all processes, and on each of two ranks 2.7 GiB for 128 sequences at once, 1.2 for 64."""
SEQUENCE = 512


@pytest.fixture
def manifest(runner):
    """A job whose activations outweigh everything else; called with a micro-batch, it is written to a file."""
    model = runner.folder / "model"
    AutoTokenizer.from_pretrained(runner.model).save_pretrained(model)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=SEQUENCE,
        )
    ).bfloat16().save_pretrained(model)
    text = "".join(p.read_text("utf-8") for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60])
    size = 4 * SEQUENCE  # characters; the tokenizer makes more tokens of them than a sequence holds
    rows = [text[start : start + size] for start in range(0, 512 * size, size)]
    (runner.folder / "texts.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))

    def write(name, micro_batch):
        spec = {
            "model": {"source": str(model)},
            "dataset": {
                "train": {"source": str(runner.folder / "texts.jsonl")},
                "format": "Text",
                "maxLength": SEQUENCE,
                "longRows": "Truncate",
                "packing": False,
            },
            "lora": {"rank": 8},
            "training": {
                "maxSteps": 2,
                "globalBatchSize": 256,
                "microBatchSize": micro_batch,
                "gradientCheckpointing": "None",
                "learningRate": "0.005",
            },
            "output": {"destination": str(runner.folder / f"out-{name}")},
        }
        path = runner.folder / f"{name}.yaml"
        job = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": {"name": name}, "spec": spec}
        path.write_text(yaml.safe_dump(job))
        return path

    return write


def qlora_run(runner, path, before=None):
    command = [sys.executable, "-c", "from qlora_cli.app import app; app()", "run", str(path), "--ranks", "2"]
    done = subprocess.run(
        command,
        cwd=runner.folder,
        env={**os.environ, "QLORA_CACHE": str(runner.cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=before,
    )
    folder = runner.folder / "runs" / path.stem
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "run.json").read_text()), folder


def losses(folder, attempt):
    lines = (folder / f"attempt-{attempt}" / "log.txt").read_text().splitlines()
    return [float(line.split(" loss ")[1].split()[0]) for line in lines if " INFO step " in line and " lr " in line]


def test_a_plan_that_overruns_a_real_memory_limit_ends_well_by_itself(runner, manifest, limited_memory):
    record, folder = qlora_run(runner, manifest("limited", 128), before=limited_memory(LIMIT_BYTES).enter)
    attempts, first = record["attempts"], record["attempts"][0]
    assert 2 <= len(attempts) <= 3
    assert [a["reason"] for a in attempts] == ["OutOfHostMemory"] * (len(attempts) - 1) + ["Completed"]
    assert "by the kernel, out of host memory: the limit of all processes together is 5.47 GiB" in first["message"]
    assert attempts[-1]["microBatchSize"] < 128

    small, whole = qlora_run(runner, manifest("small", attempts[-1]["microBatchSize"]))
    assert len(small["attempts"]) == 1
    assert losses(folder, len(attempts)) == pytest.approx(losses(whole, 1), abs=1e-3)
