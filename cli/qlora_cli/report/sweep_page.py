"""The page of ``qlora report`` for a sweep."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from qlora_api.sweep.trials import TrialState
from qlora_cli.report.html import document, section, table
from qlora_cli.report.sweep_charts import parallel_coordinates, parameter_slice
from qlora_cli.text import kubernetes_yaml, units

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlora_api.sweep.spec import QLoRASweepSpec
    from qlora_api.sweep.trials import Trial
    from qlora_cli.report.sweep_figures import SweepFigures

IMPORTANCE = (
    "Importance: the share of the objective's variance over the trials that a parameter explains alone (η²); of a "
    "range, over four parts with as many trials each."
)


def sweep_page(figures: SweepFigures, spec: QLoRASweepSpec, hours: str) -> str:
    """Return the whole page; ``hours`` names the unit of time, GPU-hours or CPU-rank-hours."""
    where = f" at step {figures.compared_at_step}" if figures.compared_at_step else ""
    slices = "".join(parameter_slice(p, figures.trials, figures.compared, figures.best) for p in spec.parameters)
    lines = parallel_coordinates(
        spec.parameters, figures.trials, figures.compared, f"{figures.metric}{where}", figures.best
    )
    parts = [
        section("Best and default", _default(figures, hours)),
        section("Trials", lines + _trials(figures, spec)),
        section(f"{figures.metric}{where} by parameter", slices, "charts"),
        section("Parameters", f'<p class="keys">{escape(IMPORTANCE)}</p>{_parameters(figures)}'),
        section("Sweep", f'<pre class="config">{escape(kubernetes_yaml.dump(spec.to_json_dict()))}</pre>'),
    ]
    return document(f"{figures.sweep}: report", _head(figures, hours), parts)


def _head(figures: SweepFigures, hours: str) -> str:
    kind, text = ("good", "Succeeded") if figures.best else ("", "Not finished")
    best = next((trial for trial in figures.trials if trial.name == figures.best), None)
    settings = ", ".join(f"{path} {value}" for path, value in best.parameters.items()) if best else ""
    boxes = [
        (f"Best {figures.metric}", best.value or "" if best else "", best.name if best else ""),
        ("Trials", units.number(len(figures.trials)), f"{_ended(figures)} trained to the end"),
        ("Steps", units.number(figures.steps), "of all trials"),
        (hours, f"{figures.gpu_hours:.3g}", "of all trials"),
    ]
    shown = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><i>{escape(more)}</i></div>"
        for name, value, more in boxes
        if value
    )
    return (
        f'<header><h1>{escape(figures.sweep)} <span class="badge {kind}">{text}</span></h1>'
        f"<p>sweep {escape(figures.uid[:8])}</p><p class=why>{escape(settings)}</p>"
        f'<div class="figures">{shown}</div></header>'
    )


def _ended(figures: SweepFigures) -> int:
    return sum(trial.state is TrialState.SUCCEEDED for trial in figures.trials)


def comparison(figures: SweepFigures, hours: str) -> str:
    """Return in words what the search has gained over the template's values, and at what cost."""
    default = figures.default
    if figures.best is None:
        return ""
    if default is None:
        return "No trial with the template's values has trained to the end: there is no default to compare with."
    if default.gain <= 0:
        return f"No trial is better than {default.name}, which has the template's values: {default.value:.5g}."
    price = f", {default.gpu_hours_per_percent:.3g} {hours} for each percent" if default.gpu_hours_per_percent else ""
    share = f"{default.gain / abs(default.value):.2%}" if default.value else f"{default.gain:.4g}"
    return f"{figures.best} is {share} better than {default.name}, which has the template's values{price}."


def _default(figures: SweepFigures, hours: str) -> str:
    text = comparison(figures, hours)
    return f"<p>{escape(text)}</p>" if text else ""


def _trials(figures: SweepFigures, spec: QLoRASweepSpec) -> str:
    head = ["Trial", *(escape(p.path) for p in spec.parameters), "State", "Step", str(figures.metric), "Time"]
    first = len(spec.parameters) + 2
    return table(head, _rows(figures, spec), numbers={first, first + 1, first + 2})


def _rows(figures: SweepFigures, spec: QLoRASweepSpec) -> Iterator[list[str]]:
    def key(trial: Trial) -> tuple[bool, int, int]:
        return (trial.name != figures.best, -trial.step, trial.number)

    for trial in sorted(figures.trials, key=key):
        name = f"<b>{escape(trial.name)}</b>" if trial.name == figures.best else escape(trial.name)
        settings = (escape(trial.parameters[p.path]) for p in spec.parameters)
        cells = (escape(str(trial.state)), units.number(trial.step), escape(trial.value or ""))
        yield [name, *settings, *cells, units.duration(trial.gpu_seconds)]


def parameter_rows(figures: SweepFigures) -> Iterator[list[str]]:
    """Give a row for each value of each parameter: parameter, importance, value, trials, mean and best."""
    for parameter in sorted(figures.parameters, key=lambda p: -(p.importance or 0.0)):
        importance = "" if parameter.importance is None else f"{parameter.importance:.1%}"
        for index, each in enumerate(parameter.slices):
            first = (parameter.path, importance) if index == 0 else ("", "")
            yield [*first, each.text, str(each.trials), f"{each.mean:.5g}", f"{each.best:.5g}"]


PARAMETER_HEADS = ("Parameter", "Importance", "Value", "Trials", "Mean", "Best")


def _parameters(figures: SweepFigures) -> str:
    rows = ([escape(cell) for cell in row] for row in parameter_rows(figures))
    return table(PARAMETER_HEADS, rows, numbers={1, 3, 4, 5})
