"""Sweeps, and a machine that runs their trials: a trial's losses are a function of its parameters and steps."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

from qlora_api.sweep.parameters import text_of
from qlora_api.sweep.sweep import QLoRASweep
from qlora_api.sweep.trials import Trial, TrialState, trial_name
from qlora_sweep.decide import Create, Finish, Hold, Proceed, Resume, decide
from qlora_sweep.suggest import suggest

STEPS = 90
SECONDS_A_STEP = 10
JOB = {
    "model": {"source": "hf://org/base@main"},
    "dataset": {"train": {"source": "s3://b/rows"}, "eval": {"source": "s3://b/eval"}, "format": "Text"},
    "training": {"maxSteps": STEPS, "evaluation": {"everySteps": 10}},
    "output": {"destination": "s3://b/sweep"},
}
RANK = {"path": "lora.rank", "choices": [8, 16, 32]}
RATE = {"path": "training.learningRate", "choices": ["1e-4", "3e-4", "1e-3", "3e-3"]}
RATES = {"path": "training.learningRate", "range": {"min": "1e-5", "max": "1e-2", "scale": "Log"}}


def manifest(**changes: Any) -> dict[str, Any]:
    spec = {
        "template": {"spec": copy.deepcopy(JOB)},
        "parameters": [RANK, RATE],
        "algorithm": {"type": "Grid"},
        "maxTrials": 12,
        **changes,
    }
    return {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRASweep", "metadata": {"name": "search"}, "spec": spec}


def sweep_spec(**changes: Any):
    return QLoRASweep.from_manifest(manifest(**changes)).spec


def loss(parameters: dict[str, str], step: int) -> float:
    """A loss that falls with the steps to a floor, lowest at rank 16 and a rate of 1e-3."""
    rate = float(parameters["training.learningRate"])
    rank = int(parameters.get("lora.rank", "16"))
    return 1 + 0.1 * math.log10(rate / 1e-3) ** 2 + 0.01 * math.log2(rank / 16) ** 2 + 1 / (1 + step)


class Simulation:
    """Runs trials by steps of ten, in an order of its own; ``fails`` names the trials that fail,
    once they have taken ``fails_after`` steps."""

    def __init__(self, spec, seed: int = 0, fails=(), fails_after: int = 0, steps: int = STEPS) -> None:
        self.spec = spec
        self.trials: dict[int, Trial] = {}
        self.most_running = 0
        self.steps = 0
        self._random = random.Random(seed)
        self._fails, self._fails_after = fails, fails_after
        self._length = steps

    def do(self, action: Create | Resume) -> None:
        update = {"state": TrialState.RUNNING, "pause_at_step": action.pause_at_step}
        if isinstance(action, Create):
            assert action.number not in self.trials
            texts = {path: text_of(value) for path, value in action.values.items()}
            made = Trial(number=action.number, name=trial_name("search", action.number), parameters=texts, **update)
            self.trials[action.number] = made
        else:
            assert self.trials[action.number].state is TrialState.SUSPENDED
            self.trials[action.number] = self.trials[action.number].model_copy(update=update)

    def suspend(self, number: int) -> None:
        self.trials[number] = self.trials[number].model_copy(update={"state": TrialState.SUSPENDED})

    def advance(self) -> None:
        """Train one running trial, by chance, for ten steps."""
        running = [trial for trial in self.trials.values() if trial.state is TrialState.RUNNING]
        self.most_running = max(self.most_running, len(running))
        trial = self._random.choice(running)
        step = trial.step + 10
        self.steps += 10
        update: dict[str, Any] = {
            "step": step,
            "value": f"{loss(trial.parameters, step):.6g}",
            "gpu_seconds": trial.gpu_seconds + 10 * SECONDS_A_STEP,
        }
        if trial.number in self._fails and trial.step >= self._fails_after:
            update |= {"state": TrialState.FAILED, "message": "out of memory", "value": None}
        elif step >= self._length:
            update["state"] = TrialState.SUCCEEDED
        elif trial.pause_at_step is not None and step >= trial.pause_at_step:
            update["state"] = TrialState.SUSPENDED
        self.trials[trial.number] = trial.model_copy(update=update)

    def run(self, crash_after=lambda _: None) -> Finish | Hold:
        """Drive the sweep to its end; ``crash_after`` gives how many actions of a decision are done before a crash."""
        while True:
            decision = decide(self.spec, [*self.trials.values()], suggest)
            if not isinstance(decision, Proceed):
                return decision
            for action in decision.actions[: crash_after(len(decision.actions))]:
                self.do(action)
            if any(trial.state is TrialState.RUNNING for trial in self.trials.values()):
                self.advance()
