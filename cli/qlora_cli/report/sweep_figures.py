"""Figures of a sweep: which parameters matter, which values do best, and what the search has cost. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from qlora_api.base import Model
from qlora_api.sweep.parameters import Parameter
from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.trials import Trial, TrialState
from qlora_sweep.results import best_of, used_gpu_hours, value_of

BINS = 4
"""Parts of a range, each with as many trials, over which values are averaged."""


@dataclass(frozen=True)
class TrialHistory:
    """One trial, and the objective at each step at which an attempt ended."""

    trial: Trial
    values: Mapping[int, float]


class SliceValue(Model):
    """Trials with one value of a parameter, or with values of one part of its range."""

    text: str
    trials: int
    mean: float
    best: float


class ParameterFigures(Model):
    path: str
    importance: float | None
    """Share of the variance of the objective that this parameter explains alone (η², a main effect of an analysis of
    variance). None: too few trials, or all values are equal."""
    slices: list[SliceValue]


class DefaultFigures(Model):
    """The best trial beside the one with the template's values."""

    name: str
    value: float
    gain: float
    """Difference of the best trial's value, positive where that is better."""
    gpu_hours_per_percent: float | None
    """GPU-hours of the whole sweep for each percent of gain."""


class SweepFigures(Model):
    """Figures of a sweep, as ``report.json`` has them."""

    sweep: str
    uid: str
    metric: str
    maximized: bool
    compared_at_step: int | None
    """Step at which the objective of all trials is known: parameters are compared there. None: at each trial's end."""
    gpu_hours: float
    steps: int
    """Optimizer steps of all trials together."""
    best: str | None
    default: DefaultFigures | None
    """None: no trial has the template's values, or it has no result."""
    parameters: list[ParameterFigures]
    trials: list[Trial]
    compared: dict[str, float]
    """Value of each trial at the step of the comparison, by name."""


def sweep_figures(name: str, uid: str, spec: QLoRASweepSpec, histories: Sequence[TrialHistory]) -> SweepFigures:
    """Return the figures of a sweep, over or not."""
    trials = [history.trial for history in histories]
    step, compared = compared_values(spec, histories)
    metric = spec.objective.metric
    best = best_of(trials, metric)
    by_name = {trial.name: trial for trial in trials}
    return SweepFigures(
        sweep=name,
        uid=uid,
        metric=metric,
        maximized=metric.is_maximized,
        compared_at_step=step,
        gpu_hours=round(used_gpu_hours(trials), 4),
        steps=sum(trial.step for trial in trials),
        best=best.name if best else None,
        default=_default(spec, trials, best),
        parameters=[
            _parameter(parameter, [(by_name[key], value) for key, value in compared.items()], metric.is_maximized)
            for parameter in spec.parameters
        ],
        trials=trials,
        compared=compared,
    )


def compared_values(spec: QLoRASweepSpec, histories: Sequence[TrialHistory]) -> tuple[int | None, dict[str, float]]:
    """Return the step at which trials can be compared, and their values there."""
    if spec.early_stopping is None:
        ends = ((h.trial.name, value_of(h.trial)) for h in histories if h.trial.state is TrialState.SUCCEEDED)
        return None, {name: value for name, value in ends if value is not None}
    step = spec.early_stopping.min_steps
    return step, {h.trial.name: h.values[step] for h in histories if step in h.values}


def _parameter(parameter: Parameter, results: Sequence[tuple[Trial, float]], maximized: bool) -> ParameterFigures:
    groups = _grouped(parameter, results)
    pick = max if maximized else min
    return ParameterFigures(
        path=parameter.path,
        importance=explained_variance([*groups.values()]),
        slices=[
            SliceValue(text=text, trials=len(values), mean=fmean(values), best=pick(values))
            for text, values in groups.items()
        ],
    )


def _grouped(parameter: Parameter, results: Sequence[tuple[Trial, float]]) -> dict[str, list[float]]:
    """Return the objective's values by choice, or by parts of a range with as many trials each."""
    if parameter.choices is not None:
        groups = {
            text: [value for trial, value in results if trial.parameters[parameter.path] == text]
            for text in parameter.texts
        }
        return {text: values for text, values in groups.items() if values}
    ordered = sorted(results, key=lambda result: float(result[0].parameters[parameter.path]))
    bins = min(BINS, len(ordered))
    cut = [ordered[len(ordered) * part // bins : len(ordered) * (part + 1) // bins] for part in range(bins)]
    return {
        _ends(part[0][0].parameters[parameter.path], part[-1][0].parameters[parameter.path]): [v for _, v in part]
        for part in cut
    }


def _ends(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def explained_variance(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the variance between groups over that of all values (η²); None where it says nothing."""
    values = [value for group in groups for value in group]
    if len(groups) < 2 or len(values) <= len(groups):
        return None
    mean = fmean(values)
    whole = sum((value - mean) ** 2 for value in values)
    between = sum(len(group) * (fmean(group) - mean) ** 2 for group in groups)
    return between / whole if whole > 0 else None


def _default(spec: QLoRASweepSpec, trials: Sequence[Trial], best: Trial | None) -> DefaultFigures | None:
    """Compare the best trial with the one that has the template's values; both must have trained to the end."""
    own = [p.comparable(spec.template.spec.at(p.path)) for p in spec.parameters]
    succeeded = (t for t in trials if t.state is TrialState.SUCCEEDED)
    found = next((t for t in succeeded if [p.comparable(t.parameters[p.path]) for p in spec.parameters] == own), None)
    value, best_value = value_of(found) if found else None, value_of(best) if best else None
    if found is None or value is None or best_value is None:
        return None
    gain = best_value - value if spec.objective.metric.is_maximized else value - best_value
    percent = 100 * gain / abs(value) if value else 0.0
    hours = used_gpu_hours(trials) / percent if percent > 0 else None
    return DefaultFigures(name=found.name, value=value, gain=gain, gpu_hours_per_percent=hours)
