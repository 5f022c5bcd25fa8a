"""Check what a job has published: the adapter is what its manifest says, and PEFT loads it onto the base."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from demo.installed_cluster import InstalledCluster

LOADS = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
assert any("lora_B" in n and p.abs().sum() > 0 for n, p in model.named_parameters())
"""
SECONDS = 120


def check_adapter(installed: InstalledCluster, adapter: Mapping[str, str]) -> None:
    """Check an adapter of status against its manifest and its base. Torch stays in other processes."""
    environment = {**os.environ, **installed.s3.environment}
    verify = [sys.executable, "-m", "qlora_trainer.verify", adapter["manifestUri"]]
    done = subprocess.run(verify, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    bucket, _, place = adapter["uri"].removeprefix("s3://").partition("/")
    files = installed.s3.folder_of(bucket)
    loads = [sys.executable, "-c", LOADS, files / "base", files / place]
    done = subprocess.run(loads, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
