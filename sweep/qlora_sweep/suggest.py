"""Choose the parameters of a trial: a function of the sweep's spec, the trial's number and earlier results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from qlora_api.sweep.parameters import Parameter, Scale, ValueKind, text_of
from qlora_api.sweep.spec import AlgorithmType, QLoRASweepSpec
from qlora_sweep.grid import combination, texts_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

    from qlora_sweep.results import Result

MAX_DRAWS = 10
"""Draws for one trial, as long as there is a trial with the same parameters: training is deterministic."""
TRIALS_A_SEED = 1_000_003
"""More than a sweep has trials: no trial of one seed draws as one of the next seed does."""
STARTUP_TRIALS = 10
"""Random trials before TPE's first own: Optuna's default, too."""


def suggest(spec: QLoRASweepSpec, number: int, earlier: Sequence[Result]) -> dict[str, Any]:
    """Return the value of each parameter by path.

    Args:
        spec: of the sweep.
        number: of the trial, from 0.
        earlier: results of the trials with smaller numbers, all of them. Random looks at their parameters alone.

    """
    if spec.algorithm.type is AlgorithmType.GRID:
        return combination(spec.parameters, number)
    taken = [result.parameters for result in earlier]
    for draw in range(MAX_DRAWS):
        values = _ask(spec, number, draw, earlier)
        if texts_of(values) not in taken:
            return values
    return _first_other(spec.parameters, taken) or values


def _first_other(parameters: Sequence[Parameter], taken: Sequence[Mapping[str, str]]) -> dict[str, Any] | None:
    """Return the first combination of choices that no trial has; None where there are ranges, or no such one."""
    if any(parameter.choices is None for parameter in parameters):
        return None
    paths = [parameter.path for parameter in parameters]
    every = (dict(zip(paths, each, strict=True)) for each in product(*(p.choices or () for p in parameters)))
    return next((values for values in every if texts_of(values) not in taken), None)


def _ask(spec: QLoRASweepSpec, number: int, draw: int, earlier: Sequence[Result]) -> dict[str, Any]:
    """Rebuild the study from the results and ask it once: no state of Optuna's outlives the call."""
    # Not needed for a grid, and takes 38 MiB.
    import optuna  # noqa: PLC0415

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {p.path: _distribution(p) for p in spec.parameters}
    maximized = spec.objective.metric.is_maximized
    study = optuna.create_study(sampler=_sampler(spec, number, draw), direction="maximize" if maximized else "minimize")
    for result in earlier:
        study.add_trial(_frozen(spec.parameters, distributions, result))
    asked = study.ask(distributions)
    return {p.path: _value(p, asked.params[p.path]) for p in spec.parameters}


def _sampler(spec: QLoRASweepSpec, number: int, draw: int) -> BaseSampler:
    from optuna.samplers import RandomSampler, TPESampler  # noqa: PLC0415

    seed = ((spec.algorithm.seed * TRIALS_A_SEED + number) * MAX_DRAWS + draw) % 2**32
    if spec.algorithm.type is AlgorithmType.RANDOM:
        return RandomSampler(seed)
    return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True)


def _distribution(parameter: Parameter) -> BaseDistribution:
    from optuna.distributions import (  # noqa: PLC0415
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if parameter.choices is not None:  # by their texts: a choice may be a list
        return CategoricalDistribution(parameter.texts)
    assert parameter.range is not None
    low, high = float(parameter.range.min), float(parameter.range.max)
    log = parameter.range.scale is Scale.LOG
    if parameter.kind is ValueKind.INTEGER:
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _frozen(
    parameters: Sequence[Parameter], distributions: Mapping[str, BaseDistribution], result: Result
) -> FrozenTrial:
    """Return an earlier trial as Optuna's; one without a value counts as running, and no other is drawn near it."""
    from optuna.trial import TrialState, create_trial  # noqa: PLC0415

    unfinished = TrialState.FAIL if result.failed else TrialState.RUNNING
    state = unfinished if result.value is None else TrialState.COMPLETE
    params = {p.path: _internal(p, result.parameters[p.path]) for p in parameters}
    return create_trial(state=state, value=result.value, params=params, distributions=dict(distributions))


def _internal(parameter: Parameter, text: str) -> float | int | str:
    """Return a recorded value as Optuna's."""
    if parameter.choices is not None:
        return text
    return int(text) if parameter.kind is ValueKind.INTEGER else float(text)


def _value(parameter: Parameter, drawn: Any) -> Any:
    """Return what Optuna has drawn as a value of the field."""
    if parameter.choices is not None:
        return next(choice for choice in parameter.choices if text_of(choice) == drawn)
    assert math.isfinite(drawn)
    return parameter.value_of(float(drawn))
