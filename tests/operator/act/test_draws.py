"""Parameters that a process of their own draws: those of 'qlora sweep', and an error where there are none."""

from __future__ import annotations

import asyncio
import sys

import pytest

from qlora_api.sweep.sweep import QLoRASweep
from qlora_operator.act.sweeps import draws
from qlora_operator.act.sweeps.draws import DrawError, Draws
from qlora_sweep.suggest import suggest

JOB = {
    "model": {"source": "s3://m/base"},
    "dataset": {"train": {"source": "s3://d/rows"}, "eval": {"fraction": "0.1"}, "format": "Text"},
    "training": {"maxSteps": 10},
    "output": {"destination": "s3://a/sweep"},
}
SPEC = QLoRASweep.from_manifest(
    {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRASweep",
        "metadata": {"name": "search"},
        "spec": {
            "template": {"spec": JOB},
            "parameters": [
                {"path": "training.learningRate", "range": {"min": "1e-5", "max": "1e-2", "scale": "Log"}},
                {"path": "lora.targetModules", "choices": [["q_proj"], ["q_proj", "v_proj"]]},
            ],
            "algorithm": {"type": "Random", "seed": 7},
            "maxTrials": 8,
            "parallelTrials": 2,
        },
    }
).spec


def test_the_process_draws_what_a_sweep_on_one_machine_draws():
    drawn = asyncio.run(Draws().draw(SPEC, []))
    assert list(drawn) == [0, 1]
    assert drawn[0] == suggest(SPEC, 0, [])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        pytest.param((sys.executable, "-c", "raise SystemExit('no optuna')"), "exit code 1: no optuna", id="fails"),
        pytest.param((sys.executable, "-c", "import time; time.sleep(600)"), "within 0.5 s", id="hangs"),
    ],
)
def test_a_process_that_draws_nothing_is_an_error_and_does_not_stay(monkeypatch, command, said):
    monkeypatch.setattr(draws, "COMMAND", command)
    monkeypatch.setattr(draws, "TIMEOUT_SECONDS", 0.5 if "within" in said else 60)
    with pytest.raises(DrawError, match=said):
        asyncio.run(Draws().draw(SPEC, []))
