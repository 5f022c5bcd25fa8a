"""Optimizers, groups and the schedule."""

from __future__ import annotations

import pytest
import torch

from qlora_api.spec import Offload, Optimizer, Schedule, TrainingSpec
from qlora_trainer.engine.optim import learning_rate, make_optimizer, parameter_groups


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        pytest.param(Schedule.CONSTANT, 0, [1.0, 1.0, 1.0, 1.0], id="constant"),
        pytest.param(Schedule.LINEAR, 0, [1.0, 0.75, 0.5, 0.25], id="linear-ends-one-step-before-zero"),
        pytest.param(Schedule.COSINE, 0, [1.0, 0.853553, 0.5, 0.146447], id="cosine"),
        pytest.param(Schedule.LINEAR, 2, [1 / 3, 2 / 3, 1.0, 0.5], id="warmup-never-wastes-a-step-at-zero"),
        pytest.param(Schedule.COSINE, 9, [0.1, 0.2, 0.3, 0.4], id="warmup-longer-than-the-run"),
    ],
)
def test_learning_rate_follows_the_schedule(schedule, warmup, expected):
    training = TrainingSpec(epochs=1, learning_rate="1", schedule=schedule, warmup_steps=warmup)
    assert [learning_rate(training, step, 4) for step in range(4)] == pytest.approx(expected, abs=1e-6)


def test_matrices_decay_and_vectors_do_not():
    parameters = {"a": torch.nn.Parameter(torch.zeros(2, 2)), "bias": torch.nn.Parameter(torch.zeros(2))}
    groups = parameter_groups(parameters, 0.1)
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 1), (0.0, 1)]


def test_a_group_without_members_is_left_out():
    groups = parameter_groups({"a": torch.nn.Parameter(torch.zeros(2, 2))}, 0.1)
    assert len(groups) == 1


@pytest.mark.parametrize("kind", list(Optimizer))
@pytest.mark.parametrize("offload", list(Offload))
def test_every_optimizer_lowers_a_quadratic(kind, offload, recwarn):
    parameter = torch.nn.Parameter(torch.full((64, 128), 3.0))
    training = TrainingSpec(max_steps=1, learning_rate="0.1", optimizer=kind)
    optimizer = make_optimizer({"w": parameter}, training, offload)
    for _ in range(20):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert parameter.abs().mean() < 1.5
    paged = kind in (Optimizer.PAGED_ADAMW_8BIT, Optimizer.PAGED_ADAMW_32BIT) and offload is Offload.NONE
    assert any("Paged optimizers are not supported on CPU" in str(w.message) for w in recwarn) == paged
