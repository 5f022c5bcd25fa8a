"""A run that would end within its warmup is refused in Prepare, which knows the steps of an epoch."""

from __future__ import annotations

import pytest

from qlora_api.spec import TrainingSpec
from qlora_trainer.errors import UserError
from qlora_trainer.prepare.command import check_warmup


def warming(steps, **length):
    return TrainingSpec.model_validate({"globalBatchSize": 8, "warmupSteps": steps, **length})


@pytest.mark.parametrize("steps", [0, 29])
def test_a_warmup_within_the_run_is_taken(steps):
    check_warmup(warming(steps, epochs=3), 10)


@pytest.mark.parametrize("steps", [30, 1000])
def test_a_warmup_as_long_as_the_run_is_refused_with_the_steps(steps):
    with pytest.raises(UserError) as refused:
        check_warmup(warming(steps, epochs=3), 10)
    expected = f"spec.training.warmupSteps: {steps} must be less than the steps of the run, 30: 3 epochs of 10"
    assert str(refused.value) == expected


def test_of_max_steps_nothing_is_said_anew():
    check_warmup(warming(99, maxSteps=100), 1)
