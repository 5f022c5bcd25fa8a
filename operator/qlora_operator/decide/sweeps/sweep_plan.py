"""Decide what a QLoRASweep needs: QLoRAJobs to create and to change, and when to look again. Pure.

What follows from the trials says ``qlora_sweep``, for this and for 'qlora sweep' alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.sweep import QLoRASweep
from qlora_operator.decide.sweeps.trial_state import ObservedTrial
from qlora_operator.manifests.trial import trial_job
from qlora_sweep.decide import Create, Decision, Proceed, Resume
from qlora_sweep.results import used_gpu_hours

SHORTEST_WAKE_SECONDS = 1.0
Trials = Mapping[int, ObservedTrial]
"""By number."""


@dataclass(frozen=True)
class TrialPatch:
    """A change of a trial's spec, on the version that was decided on."""

    name: str
    body: dict[str, Any]


@dataclass(frozen=True)
class SweepActions:
    """Calls to the API server, in this order: change, create."""

    patch: tuple[TrialPatch, ...] = ()
    create: tuple[dict[str, Any], ...] = ()


def actions_of(sweep: QLoRASweep, trials: Trials, decision: Decision) -> SweepActions:
    """Return the calls that a decision asks for; those that were made already are not among them."""
    if not isinstance(decision, Proceed):
        running = (trials[number] for number in decision.suspend)
        return SweepActions(tuple(_patch(each, {"suspend": True}) for each in running if not each.is_suspended))
    patches = [_resumed(trials[a.number], a) for a in decision.actions if isinstance(a, Resume)]
    return SweepActions(
        tuple(patch for patch in patches if patch),
        tuple(trial_job(sweep, a.number, a.values, a.pause_at_step) for a in decision.actions if isinstance(a, Create)),
    )


def budget_wake(spec: QLoRASweepSpec, trials: Trials) -> float | None:
    """Return the seconds until the trials that run have used up the budget; None: no event is awaited by time."""
    gpus = sum(each.gpus for each in trials.values())
    if spec.budget_gpu_hours is None or not gpus:
        return None
    left = float(spec.budget_gpu_hours) - used_gpu_hours([each.trial for each in trials.values()])
    return max(SHORTEST_WAKE_SECONDS, math.ceil(left * 3600 / gpus))


def _resumed(observed: ObservedTrial, action: Resume) -> TrialPatch | None:
    """Return the change that has a trial go on; None where its spec says so already."""
    if not observed.is_suspended and observed.trial.pause_at_step == action.pause_at_step:
        return None
    return _patch(observed, {"suspend": False, "policy": {"pauseAtStep": action.pause_at_step}})


def _patch(observed: ObservedTrial, spec: dict[str, Any]) -> TrialPatch:
    return TrialPatch(observed.trial.name, {"metadata": {"resourceVersion": observed.resource_version}, "spec": spec})
