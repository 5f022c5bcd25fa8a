from __future__ import annotations

from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from qlora_api.batch import BatchSplit
from qlora_trainer.data.batches import IGNORED, Batches, MicroBatch, eval_batches
from qlora_trainer.data.packing import pack, unpacked
from qlora_trainer.data.tokenized_rows import TokenizedRows

SPLITS_OF_8 = [
    BatchSplit(world_size=world, micro_batch_size=micro, gradient_accumulation_steps=8 // world // micro)
    for world in (1, 2, 4, 8)
    for micro in (1, 2, 4, 8)
    if 8 % (world * micro) == 0
]


def random_rows(seed: int, most: int = 60) -> TokenizedRows:
    """Each row begins with a token of its own, by which it is known."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(int(rng.integers(1, 120))):
        length = int(rng.integers(2, most))
        targets = rng.random(length) < 0.5
        targets[-1] = True
        rows.append(([1000 + number, *rng.integers(0, 1000, length - 1).tolist()], targets.tolist()))
    return TokenizedRows.of(rows)


def sequences_of(rows: TokenizedRows, packed: bool):
    return pack(rows.lengths, 64) if packed else unpacked(len(rows))


def row_numbers(batch: MicroBatch) -> list[int]:
    """Numbers of the rows in a micro-batch; none in a dummy."""
    if not (batch.labels != IGNORED).any():
        return []
    return (batch.input_ids[0, batch.cu_seqlens[:-1].long()] - 1000).tolist()


def run_of(rows, sequences, split, seed=7) -> list[Batches]:
    return [Batches(rows, sequences, split, rank, seed) for rank in range(split.world_size)]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("seed", range(12))
def test_every_epoch_covers_every_row_once_over_all_ranks(seed, packed):
    rows = random_rows(seed)
    sequences = sequences_of(rows, packed)
    split = SPLITS_OF_8[seed % len(SPLITS_OF_8)]
    ranks = run_of(rows, sequences, split)
    epoch_steps = ranks[0].steps_per_epoch
    assert epoch_steps == -(-len(sequences) // 8)
    for epoch in range(3):
        seen, announced = [], []
        for index in range(epoch * epoch_steps, (epoch + 1) * epoch_steps):
            steps = [rank.step(index) for rank in ranks]
            seen += [row for step in steps for batch in step.micro_batches for row in row_numbers(batch)]
            announced += steps[0].rows.tolist()
        assert sorted(seen) == sorted(announced) == list(range(len(rows)))


@pytest.mark.parametrize("seed", range(6))
def test_a_step_holds_the_same_rows_on_any_number_of_ranks_and_any_micro_batch(seed):
    rows = random_rows(seed)
    sequences = sequences_of(rows, packed=seed % 2 == 0)
    for index in range(2 * Batches(rows, sequences, SPLITS_OF_8[0], 0, 7).steps_per_epoch):
        wanted = Batches(rows, sequences, SPLITS_OF_8[0], 0, 7).step(index)
        for split in SPLITS_OF_8:
            steps = [rank.step(index) for rank in run_of(rows, sequences, split)]
            dealt = [row for step in steps for batch in step.micro_batches for row in row_numbers(batch)]
            assert sorted(dealt) == sorted(wanted.rows.tolist())
            for step in steps:
                assert step.rows.tolist() == wanted.rows.tolist()
                assert (step.target_tokens, step.tokens) == (wanted.target_tokens, wanted.tokens)


@pytest.mark.parametrize(
    "split", SPLITS_OF_8, ids=lambda s: f"{s.world_size}x{s.micro_batch_size}x{s.gradient_accumulation_steps}"
)
def test_ranks_do_the_same_number_of_passes_and_the_counts_are_those_of_the_labels(split):
    rows = random_rows(3)
    sequences = sequences_of(rows, packed=True)
    ranks = run_of(rows, sequences, split)
    for index in range(ranks[0].steps_per_epoch):
        steps = [rank.step(index) for rank in ranks]
        assert {len(step.micro_batches) for step in steps} == {split.gradient_accumulation_steps}
        batches = [batch for step in steps for batch in step.micro_batches]
        assert sum(int((b.labels != IGNORED).sum()) for b in batches) == steps[0].target_tokens
        assert sum(b.input_ids.numel() for b in batches if row_numbers(b)) == steps[0].tokens
        assert max(len({int(s) for s in _sequences_in(b, sequences)}) for b in batches) <= split.micro_batch_size


def _sequences_in(batch: MicroBatch, sequences) -> set[int]:
    of_row = {int(row): i for i in range(len(sequences)) for row in sequences.rows(i)}
    return {of_row[row] for row in row_numbers(batch)}


def test_a_last_step_smaller_than_the_ranks_is_filled_with_dummies_that_have_no_loss():
    rows = TokenizedRows.of([([1000 + i, 5, 6], [False, True, True]) for i in range(9)])
    split = BatchSplit(world_size=4, micro_batch_size=1, gradient_accumulation_steps=2)
    last = [rank.step(1) for rank in run_of(rows, unpacked(9), split)]
    real = [bool(row_numbers(batch)) for step in last for batch in step.micro_batches]
    assert real == [True] + [False] * 7
    assert all(batch.input_ids.numel() > 1 for step in last for batch in step.micro_batches)
    assert [step.target_tokens for step in last] == [2] * 4


@pytest.mark.parametrize("seed", range(5))
def test_real_tokens_are_balanced_over_ranks(seed):
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4, 1, 64), 2, 2000).astype(int)
    rows = TokenizedRows.of([([1000 + i] + [1] * (n - 1), [True] * n) for i, n in enumerate(lengths)])
    split = BatchSplit(world_size=4, micro_batch_size=4, gradient_accumulation_steps=4)
    loads = [sum(b.input_ids.numel() for b in rank.step(0).micro_batches) for rank in run_of(rows, unpacked(64), split)]
    assert max(loads) - min(loads) <= lengths.max() / 4
    for rank in run_of(rows, unpacked(64), split):
        passes = [b.input_ids.numel() for b in rank.step(0).micro_batches]
        assert passes == sorted(passes, reverse=True), "large ones run at the same time on all ranks"


def test_labels_are_shifted_within_a_row_and_never_across():
    rows = TokenizedRows.of([([10, 11, 12], [True, False, True]), ([20, 21], [True, True]), ([30, 31], [False, True])])
    batch = Batches(
        rows, unpacked(3), BatchSplit(world_size=1, micro_batch_size=3, gradient_accumulation_steps=1), 0, 0
    )
    step = batch.step(0)
    (only,) = step.micro_batches
    by_row = {10: [-100, 12, -100], 20: [21, -100], 30: [31, -100]}
    starts = only.cu_seqlens.tolist()
    for start, stop in pairwise(starts):
        first = int(only.input_ids[0, start])
        assert only.labels[0, start:stop].tolist() == by_row[first]
        assert only.position_ids[0, start:stop].tolist() == list(range(stop - start))
    assert step.target_tokens == 3
    assert step.tokens == 7
    assert only.max_seqlen == 3
    assert starts[-1] == 7


def test_tensors_have_the_shapes_and_types_that_models_and_kernels_want():
    rows = random_rows(1)
    split = BatchSplit(world_size=1, micro_batch_size=2, gradient_accumulation_steps=1)
    (batch,) = Batches(rows, unpacked(len(rows)), split, 0, 0).step(0).micro_batches
    for name in ("input_ids", "labels", "position_ids"):
        tensor = getattr(batch, name)
        assert tensor.dtype == torch.int64
        assert tensor.shape == (1, int(batch.cu_seqlens[-1]))
    assert batch.cu_seqlens.dtype == torch.int32
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.cu_seqlens.device.type == "meta"
    assert moved.max_seqlen == batch.max_seqlen


def same(one: MicroBatch, other: MicroBatch) -> bool:
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("input_ids", "labels", "cu_seqlens"))


@pytest.mark.parametrize("first", [0, 3, 11, 29])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(first):
    rows = random_rows(5)
    sequences = sequences_of(rows, packed=False)
    split = BatchSplit(world_size=2, micro_batch_size=2, gradient_accumulation_steps=2)
    through = list(islice(Batches(rows, sequences, split, 1, 7).steps(0, 40), first, None))
    resumed = list(Batches(rows, sequences, split, 1, 7).steps(first, 40))
    assert len(through) == len(resumed) == 40 - first
    for one, other in zip(through, resumed, strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert all(same(a, b) for a, b in zip(one.micro_batches, other.micro_batches, strict=True))


def test_steps_ahead_of_time_are_the_same_and_may_be_left_early():
    rows = random_rows(5)
    batches = Batches(rows, unpacked(len(rows)), SPLITS_OF_8[0], 0, 7)
    for index, step in enumerate(batches.steps(0, 50)):
        assert step.rows.tolist() == batches.step(index).rows.tolist()
        if index == 9:
            break
    assert list(batches.steps(4, 4)) == []


def test_order_differs_between_epochs_and_seeds_and_not_between_machines():
    rows = TokenizedRows.of([([1000 + i, 1], [False, True]) for i in range(8)])
    orders = [
        Batches(rows, unpacked(8), SPLITS_OF_8[0], 0, seed).step(epoch).rows.tolist()
        for seed, epoch in ((7, 0), (7, 1), (8, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] == GOLDEN_ORDER, "a resumed run would see other rows than the run before it"


GOLDEN_ORDER = [6, 3, 4, 0, 2, 7, 5, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_evaluation_covers_every_row_once_in_the_same_number_of_passes(world_size, seed):
    rows = random_rows(seed)
    sequences = sequences_of(rows, packed=seed % 2 == 0)
    shares = [list(eval_batches(rows, sequences, 3, world_size, rank)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {-(-len(sequences) // (3 * world_size))}
    assert sorted(row for share in shares for batch in share for row in row_numbers(batch)) == list(range(len(rows)))
    labels = sum(int((batch.labels != IGNORED).sum()) for share in shares for batch in share)
    assert labels == int(rows.target_counts.sum())


@pytest.mark.parametrize("split", SPLITS_OF_8, ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_no_step_of_any_epoch_holds_more_than_the_largest(split, packed):
    for seed in range(6):
        rows = random_rows(seed)
        ranks = run_of(rows, sequences_of(rows, packed), split)
        most = max(r.largest(1).micro_batches[0].input_ids.numel() for r in ranks)
        assert all(len(r.largest(1).micro_batches) == 1 for r in ranks)
        for rank in ranks:
            for index in range(5 * rank.steps_per_epoch):
                assert max(b.input_ids.numel() for b in rank.step(index).micro_batches) <= most
