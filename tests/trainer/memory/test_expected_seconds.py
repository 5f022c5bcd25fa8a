"""Expected time of a run, from the time of one trial step."""

from types import SimpleNamespace

import pytest

from qlora_trainer.training.peak_memory_probe import expected_seconds


@pytest.mark.parametrize(
    ("done", "eval_tokens", "want"),
    [
        pytest.param(0, 0, 100, id="steps-alone"),  # 20 steps × 1000 tokens × 0.01 s on two ranks
        pytest.param(10, 0, 50, id="resumed"),
        pytest.param(0, 3000, 125, id="with-evaluations"),  # before, and at 5, 10, 15 and 20, at a third of the cost
    ],
)
def test_time_for_what_is_left(done, eval_tokens, want):
    context = SimpleNamespace(
        data=SimpleNamespace(receipt=SimpleNamespace(train_tokens=10_000, eval_tokens=eval_tokens)),
        total_steps=20,
        batches=SimpleNamespace(steps_per_epoch=10),
        steps_between_evaluations=5,
        ranks=SimpleNamespace(world_size=2),
    )
    assert expected_seconds(context, done, 0.01) == want
