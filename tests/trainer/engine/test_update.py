"""No update is applied whose gradients are not finite."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from qlora_trainer.engine.deepspeed_engine import apply_update
from qlora_trainer.errors import NonFiniteLossError
from qlora_trainer.training.context import RunState
from qlora_trainer.training.train import check_finite


def engine_with(gradient):
    """Return as much of an engine without ZeRO as apply_update uses, around one weight."""
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    module.weight.grad = torch.tensor([[gradient]])
    optimizer = torch.optim.SGD(module.parameters())
    return SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0, step=optimizer.step)


def test_gradients_are_clipped_and_applied():
    engine = engine_with(2.0)
    assert apply_update(engine, 0.5, learning_rate=0.1) == 2.0
    assert engine.module.weight.item() == pytest.approx(0.95)


@pytest.mark.parametrize("gradient", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("most", [0.3, 0.0], ids=["clipped", "not-clipped"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_does_not_stay(gradient, most):
    engine = engine_with(gradient)
    assert not math.isfinite(apply_update(engine, most, learning_rate=0.1))
    assert engine.module.weight.item() == 1.0
    assert engine.module.weight.grad is None


def test_the_attempt_ends_with_what_was_not_finite_and_its_step():
    run = RunState(step=4)
    check_finite("gradient norm", 3.0, run)
    with pytest.raises(NonFiniteLossError, match="the gradient norm of step 5 is inf: the update was not applied"):
        check_finite("gradient norm", math.inf, run)
