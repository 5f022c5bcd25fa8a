"""Ranks import DeepSpeed without what it does not need here."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import qlora_trainer.training.train
assert "deepspeed" in sys.modules
assert "mlflow" not in sys.modules
import mlflow
"""


def test_ranks_do_not_load_mlflow_which_stays_importable():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
