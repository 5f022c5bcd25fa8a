"""The arithmetic of dynamic loss scaling, and what becomes of a step that overflows."""

from __future__ import annotations

import math

import pytest

from qlora_trainer.engine.loss_scale import GROWTH_STEPS, INITIAL, SMALLEST, LossScale
from qlora_trainer.errors import NonFiniteLossError
from qlora_trainer.training.context import RunState
from qlora_trainer.training.train import next_loss_scale


def after_steps(scale, outcomes):
    for finite in outcomes:
        scale = scale.after(finite=finite)
    return scale


def test_an_overflow_halves_the_scale_and_is_counted():
    assert LossScale().after(finite=False) == LossScale(INITIAL / 2, finite_steps=0, skipped_steps=1)


def test_the_scale_doubles_after_a_long_run_without_overflow_and_counts_anew():
    before = after_steps(LossScale(), [True] * (GROWTH_STEPS - 1))
    assert (before.scale, before.finite_steps) == (INITIAL, GROWTH_STEPS - 1)
    assert before.after(finite=True) == LossScale(2 * INITIAL, finite_steps=0)


def test_an_overflow_begins_the_run_without_one_anew():
    scale = after_steps(LossScale(), [True] * (GROWTH_STEPS - 1) + [False] + [True] * (GROWTH_STEPS - 1))
    assert (scale.scale, scale.skipped_steps) == (INITIAL / 2, 1)
    assert scale.after(finite=True).scale == INITIAL


def test_the_scale_never_falls_below_its_smallest():
    assert after_steps(LossScale(), [False] * 40).scale == SMALLEST


@pytest.mark.parametrize("split", [0, 1, 7, 2003])
def test_a_run_taken_from_a_checkpoint_goes_on_with_the_same_scale(split):
    outcomes = [False, True, True, False] + [True] * 2500
    whole = RunState(step=5, loss_scale=after_steps(LossScale(), outcomes))
    stopped = RunState(step=5, loss_scale=after_steps(LossScale(), outcomes[:split]))
    resumed = RunState.from_meta(stopped.meta)
    assert after_steps(resumed.loss_scale, outcomes[split:]) == whole.loss_scale


def test_the_state_of_an_older_version_is_read_and_what_a_newer_one_adds_is_left_out():
    older = {name: value for name, value in RunState(step=3).meta.items() if name != "loss_scale"}
    assert RunState.from_meta(older) == RunState(step=3)
    assert RunState.from_meta({**older, "of_a_newer_version": 1}) == RunState(step=3)


def test_a_finite_step_goes_on():
    assert next_loss_scale(LossScale(), 2.0, 0.5, RunState()).finite_steps == 1


@pytest.mark.parametrize(("loss", "norm"), [(2.0, math.inf), (math.nan, math.nan), (math.inf, math.inf)])
def test_one_overflow_is_no_non_finite_loss(loss, norm):
    assert next_loss_scale(LossScale(), loss, norm, RunState()).skipped_steps == 1


@pytest.mark.parametrize(("loss", "norm", "what"), [(math.nan, math.nan, "loss"), (2.0, math.inf, "gradient norm")])
def test_overflows_end_the_attempt_when_the_scale_cannot_fall_any_more(loss, norm, what):
    scale, run = LossScale(), RunState(step=4)
    while not scale.is_smallest:
        scale = next_loss_scale(scale, loss, norm, run)
    assert scale.skipped_steps == math.log2(INITIAL)
    with pytest.raises(NonFiniteLossError, match=f"the {what} of step 5 is"):
        next_loss_scale(scale, loss, norm, run)


def test_a_loss_that_overflows_alone_is_not_skipped_over():
    with pytest.raises(NonFiniteLossError, match="the loss of step 1 is inf"):
        next_loss_scale(LossScale(), math.inf, 0.5, RunState())
