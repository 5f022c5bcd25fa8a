"""Limits of the tasks of spec.evaluate."""

from __future__ import annotations

import pytest

from qlora_api.spec import EvaluationTask
from qlora_trainer.tasks.harness_request import TaskOutcome
from qlora_trainer.training.measure_tasks import as_result, limit_problem


def outcome(value, *, higher_is_better=True, error=None):
    return TaskOutcome(
        name="quiz", metric="acc", value=value, standard_error=error, higher_is_better=higher_is_better, examples=9
    )


@pytest.mark.parametrize(
    ("limits", "value", "base", "higher_is_better", "words"),
    [
        ({}, 0.1, 0.9, True, None),
        ({"minimum": "0.5"}, 0.5, None, True, None),
        ({"minimum": "0.5"}, 0.4999, None, True, "acc of quiz is 0.4999, below the minimum, 0.5"),
        ({"minimum": "0.5"}, float("nan"), None, True, "below the minimum"),
        ({"maximum": "12"}, 12.0, None, False, None),
        ({"maximum": "12"}, 12.5, None, False, "acc of quiz is 12.5, above the maximum, 12"),
        ({"maximum": "12"}, float("inf"), None, False, "above the maximum"),
        ({"not_worse": True}, 0.6, 0.6, True, None),
        ({"not_worse": True}, 0.59, 0.6, True, "acc of quiz is 0.59, worse than the base's 0.6"),
        ({"not_worse": True}, 0.59, 0.6, False, None),
        ({"not_worse": True}, 0.61, 0.6, False, "worse than the base's 0.6"),
        ({"not_worse": True}, float("nan"), 0.6, True, "worse than the base's 0.6"),
    ],
)
def test_a_limit_that_is_not_reached_is_named(limits, value, base, higher_is_better, words):
    task = EvaluationTask(name="quiz", **limits)
    before = None if base is None else outcome(base, higher_is_better=higher_is_better)
    found = limit_problem(task, outcome(value, higher_is_better=higher_is_better), before)
    assert found is None if words is None else words in found


def test_a_result_without_a_standard_error_or_a_base_says_so_by_leaving_it_out():
    assert as_result(outcome(0.5, error=float("nan")), None).to_json_dict() == {
        "name": "quiz",
        "metric": "acc",
        "adapter": "0.5",
        "examples": 9,
    }
