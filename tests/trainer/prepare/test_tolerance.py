"""A job says how much of its rows may be lost or repeated, and ends in Prepare where it is more."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_api.contract import PrepareReceipt
from qlora_api.spec import Tolerance
from qlora_trainer.errors import UserError
from qlora_trainer.prepare.tokenize_rows import histogram
from qlora_trainer.prepare.tolerance import check_tolerance

RECEIPT = PrepareReceipt(
    data_hash="0",
    train_rows=80,
    train_tokens=8000,
    train_target_tokens=4000,
    train_sequences=80,
    eval_rows=10,
    eval_tokens=1000,
    truncated=20,
    dropped=6,
    fully_masked=4,
    duplicates=8,
    eval_in_train=5,
    longest=300,
    lengths={128: 80},
    packing_efficiency=0.5,
    rows=50,
    left_out=15,
    samples=[],
)
SHARES = {
    "truncated": 0.2,
    "dropped": 0.06,
    "fully_masked": 0.04,
    "duplicates": 0.1,
    "eval_in_train": 0.5,
    "left_out": 0.3,
}
"""Shares of RECEIPT: 50 rows were read and gave 100 examples, 80 for training and 10 for evaluation."""


@pytest.mark.parametrize(("name", "share"), SHARES.items())
def test_a_share_that_is_not_exceeded_is_taken(name, share):
    check_tolerance(Tolerance(**{name: str(share)}), RECEIPT)


@pytest.mark.parametrize(("name", "share"), SHARES.items())
def test_more_than_the_job_takes_ends_it_with_field_share_and_remedy(name, share):
    with pytest.raises(UserError) as refused:
        check_tolerance(Tolerance(**{name: str(share - 0.01)}), RECEIPT)
    field = {"fully_masked": "fullyMasked", "eval_in_train": "evalInTrain", "left_out": "leftOut"}.get(name, name)
    assert refused.value.error.field == f"spec.dataset.tolerance.{field}"
    assert f"{share:.1%}" in str(refused.value)


def test_without_a_tolerance_every_share_is_taken():
    check_tolerance(Tolerance(), RECEIPT)


def test_nothing_read_is_no_share():
    nothing = RECEIPT.model_copy(update={"eval_rows": 0, "eval_in_train": 0})
    check_tolerance(Tolerance(eval_in_train="0"), nothing)


def test_rows_are_counted_by_powers_of_two():
    lengths = np.array([1, 2, 3, 4, 5, 8, 9, 4096, 4097])
    assert histogram(lengths) == {1: 1, 2: 1, 4: 2, 8: 2, 16: 1, 4096: 1, 8192: 1}
