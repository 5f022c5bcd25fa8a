"""The next smaller choice after running out of memory."""

from __future__ import annotations

from qlora_api.batch import BatchSplit
from qlora_api.memory_fallback import Choice, next_smaller
from qlora_api.spec import Offload


def choice(micro=4, accumulation=4, again=False, stage=0, world_size=1):
    batch = BatchSplit(world_size=world_size, micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    return Choice(batch, again, stage)


def walk(start, needed=None):
    found = []
    step = next_smaller(start, needed)
    while step is not None:
        found.append((step.choice.batch.micro_batch_size, step.choice.gradient_checkpointing, step.choice.zero_stage))
        assert step.choice.batch.global_batch_size == start.batch.global_batch_size
        step = next_smaller(step.choice, needed)
    return found


def test_the_way_down():
    assert walk(choice()) == [(2, False, 0), (1, False, 0), (1, True, 0)]
    assert walk(choice(micro=6, accumulation=1)) == [(3, False, 0), (1, False, 0), (1, True, 0)]
    assert walk(choice(micro=1, again=True)) == []


def test_sharing_only_where_it_helps():
    def shares_help(c):
        return 100 // (1 + c.zero_stage) - (5 if c.offload is Offload.OPTIMIZER else 0)

    start = choice(micro=1, again=True, world_size=4)
    assert walk(start, shares_help) == [(1, True, 1), (1, True, 2), (1, True, 3), (1, True, 3)]
    assert walk(start, lambda c: 100 + 10 * c.zero_stage) == []
    step = next_smaller(start, shares_help)
    assert step is not None
    assert not step.resumes


def test_steps_before_resume():
    step = next_smaller(choice())
    assert step is not None
    assert step.resumes
    assert step.change == "micro-batches of 2"
