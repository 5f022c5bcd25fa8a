"""The report of a sweep: which parameters matter, the best beside the default, and what the search has cost."""

from __future__ import annotations

import json
import math
import os

import pytest
from typer.testing import CliRunner

from qlora_api.sweep.trials import Trial, TrialState
from qlora_cli import app
from qlora_cli.report.sweep_figures import TrialHistory, explained_variance, sweep_figures
from qlora_cli.report.sweep_page import comparison, sweep_page
from sweep.builders import RATES, sweep_spec

RANK = {"path": "lora.rank", "choices": [8, 16]}
RATE = {"path": "training.learningRate", "choices": ["1e-4", "2e-4", "1e-3"]}


def spec(**changes):
    return sweep_spec(**{"parameters": [RANK, RATE], "maxTrials": 6, **changes})


def loss(_rank, rate):
    return 2 + {"1e-4": 0.8, "2e-4": 0.4, "1e-3": 0.0}[rate]


def history(number, rank, rate, value, state=TrialState.SUCCEEDED, values=None):
    parameters = {"lora.rank": rank, "training.learningRate": rate}
    trial = Trial(
        number=number,
        name=f"search-{number}",
        parameters=parameters,
        state=state,
        step=90,
        value=None if value is None else str(value),
        gpu_seconds=3600,
    )
    return TrialHistory(trial, values or {})


def grid(value=loss):
    pairs = [(str(rank), rate) for rank in RANK["choices"] for rate in RATE["choices"]]
    return [history(number, rank, rate, value(rank, rate)) for number, (rank, rate) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("groups", "share"),
    [
        pytest.param([[1, 1], [2, 2]], 1.0, id="explains-all"),
        pytest.param([[1, 2], [1, 2]], 0.0, id="explains-nothing"),
        pytest.param([[1, 3], [3, 5]], 0.5, id="half"),
        pytest.param([[1, 1], [1, 1]], None, id="all-equal"),
        pytest.param([[1, 2, 3]], None, id="one-value"),
        pytest.param([[1], [2]], None, id="one-trial-a-value"),
    ],
)
def test_importance_is_the_variance_between_values_over_all(groups, share):
    assert explained_variance(groups) == (None if share is None else pytest.approx(share))


def test_importances_of_a_full_grid_are_those_of_an_analysis_of_variance():
    """Main effects of 0.4 (rank) and of -0.3, 0, 0.3 (rate), without an interaction: their shares add up to one."""

    def value(rank, rate):
        return 2 + (0.4 if rank == "8" else 0.0) + {"1e-4": 0.3, "2e-4": 0.0, "1e-3": -0.3}[rate]

    rank, rate = sweep_figures("search", "uid", spec(), grid(value)).parameters
    assert rank.importance == pytest.approx(0.04 / 0.1)
    assert rate.importance == pytest.approx(0.06 / 0.1)
    assert [(each.text, each.trials, each.best) for each in rate.slices] == [
        ("1e-4", 2, pytest.approx(2.3)),
        ("2e-4", 2, pytest.approx(2.0)),
        ("1e-3", 2, pytest.approx(1.7)),
    ]


def test_the_best_is_compared_with_the_trial_that_has_the_templates_values():
    figures = sweep_figures("search", "uid", spec(), grid())
    assert figures.default.name == "search-4"  # rank 16 and 2e-4 are a job's defaults
    assert figures.default.gain == pytest.approx(0.4)
    assert figures.gpu_hours == 6
    percent = 100 * 0.4 / 2.4
    assert figures.default.gpu_hours_per_percent == pytest.approx(6 / percent)
    assert comparison(figures, "GPU-hours") == (
        "search-2 is 16.67% better than search-4, which has the template's values, 0.36 GPU-hours for each percent."
    )


def test_a_decimal_written_in_another_way_is_the_templates_value_too():
    rates = spec(parameters=[RANK, {"path": "training.learningRate", "choices": ["1e-4", "0.00020"]}], maxTrials=4)
    trials = [history(0, "16", "1e-4", 2.0), history(1, "16", "0.00020", 2.5)]
    assert sweep_figures("search", "uid", rates, trials).default.name == "search-1"


def test_without_a_trial_of_the_default_the_page_says_so():
    figures = sweep_figures("search", "uid", spec(), grid()[:3])
    assert figures.default is None
    assert "there is no default to compare with" in sweep_page(figures, spec(), "GPU-hours")


def test_with_early_stopping_trials_are_compared_at_the_step_that_all_have_reached():
    stopped = spec(earlyStopping={"minSteps": 10})
    suspended = history(0, "8", "1e-4", 3.0, TrialState.SUSPENDED, {10: 3.0})
    finished = history(5, "16", "1e-3", 1.0, values={10: 2.5, 30: 2.0, 90: 1.0})
    failed = history(1, "8", "2e-4", None, TrialState.FAILED)
    figures = sweep_figures("search", "uid", stopped, [suspended, failed, finished])
    assert figures.compared_at_step == 10
    assert figures.compared == {"search-0": 3.0, "search-5": 2.5}
    assert figures.best == "search-5"


def test_a_range_is_cut_into_parts_with_as_many_trials_each():
    ranges = spec(parameters=[RANK, RATES], algorithm={"type": "Random"}, maxTrials=8)
    rates = ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "5e-3", "1e-2"]
    found = [history(n, "16", rate, abs(math.log10(float(rate)) + 3)) for n, rate in enumerate(rates)]
    rate = sweep_figures("search", "uid", ranges, found).parameters[1]
    assert [(each.text, each.trials) for each in rate.slices] == [
        ("1e-5 to 3e-5", 2),
        ("1e-4 to 3e-4", 2),
        ("1e-3 to 3e-3", 2),
        ("5e-3 to 1e-2", 2),
    ]
    assert rate.importance > 0.8


def test_the_command_writes_page_and_figures_and_prints_the_tables(sweep_place):
    sweep_place.write(earlyStopping={"minSteps": 4, "reductionFactor": 2})
    assert sweep_place.run() == 0, sweep_place.said
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app.app, ["report", "search"])
    assert done.exit_code == 0, done.output
    figures = json.loads((sweep_place.runs / "report.json").read_text())
    assert figures["best"] == "search-3"
    assert figures["comparedAtStep"] == 4
    assert len(figures["compared"]) == 4
    assert figures["parameters"][1]["importance"] > figures["parameters"][0]["importance"]
    assert done.output.splitlines()[-2:] == [f"{sweep_place.runs}/report.html", f"{sweep_place.runs}/report.json"]
    for expected in ("search-3 *", "Importance", "training.learningRate", "there is no default to compare with"):
        assert expected in done.output
    page = (sweep_place.runs / "report.html").read_text()
    assert page.count("<polyline") == 4
    assert page.count("<circle") == 8
    assert "<script" not in page


def test_the_trial_that_a_process_trains_is_running_and_one_that_waits_is_suspended(sweep_place):
    sweep_place.write(earlyStopping={"minSteps": 4, "reductionFactor": 2})
    assert sweep_place.run() == 0, sweep_place.said
    for number in (0, 3):
        file = sweep_place.runs / "trials" / f"search-{number}" / "run.json"
        record = json.loads(file.read_text())
        record.pop("result", None)
        (file.parent / f"attempt-{len(record['attempts'])}" / "termination.json").unlink()
        for name in ("endTime", "reason"):
            record["attempts"][-1].pop(name, None)
        file.write_text(json.dumps(record))
    (sweep_place.runs / "trials" / ".search-3.lock").write_text(str(os.getpid()))
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app.app, ["report", "search"])
    assert done.exit_code == 0, done.output
    states = {
        trial["name"]: trial["state"] for trial in json.loads((sweep_place.runs / "report.json").read_text())["trials"]
    }
    assert (states["search-0"], states["search-3"]) == ("Suspended", "Running")


@pytest.mark.parametrize("name", ["sweep.html", "page.json", "trials/search-0/run.html", "trials/search-9/run.html"])
def test_no_page_takes_the_place_of_a_record_or_of_its_figures(sweep_place, name):
    assert sweep_place.run() == 0, sweep_place.said
    records = [sweep_place.runs / "sweep.json", sweep_place.runs / "trials/search-0/run.json"]
    before = [record.read_bytes() for record in records]
    done = CliRunner().invoke(app.app, ["report", "search", "-o", str(sweep_place.runs / name)])
    assert done.exit_code == 40, done.output
    expected = "use a name that ends in .html, other than run.html and sweep.html"
    assert expected in " ".join(done.output.split())
    assert [record.read_bytes() for record in records] == before
    assert not (sweep_place.runs / name).exists()


def test_figures_replace_figures_and_nothing_else(sweep_place):
    assert sweep_place.run() == 0, sweep_place.said
    page, manifest = sweep_place.folder / "page.html", sweep_place.folder / "out/trials/search-3/manifest.json"
    assert [CliRunner().invoke(app.app, ["report", "search", "-o", str(page)]).exit_code for _ in range(2)] == [0, 0]
    before = manifest.read_bytes()
    done = CliRunner().invoke(app.app, ["report", "search", "-o", str(manifest.with_suffix(".html"))])
    assert done.exit_code == 40, done.output
    assert "manifest.json, which holds something else; use another name" in " ".join(done.output.split())
    assert manifest.read_bytes() == before


def test_the_destination_of_a_sweep_is_answered_with_the_sweeps_name(sweep_place):
    assert sweep_place.run() == 0, sweep_place.said
    done = CliRunner().invoke(app.app, ["report", "out"])
    assert done.exit_code == 40, done.output
    assert "out is the destination of sweep search: name its folder, such as runs/search" in done.output
