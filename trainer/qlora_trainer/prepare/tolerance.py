"""Limit how much of the rows a job may lose before it ends in Prepare. Light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from qlora_api.contract import PrepareReceipt
    from qlora_api.spec import Tolerance

FIELD = "spec.dataset.tolerance"


def check_tolerance(tolerance: Tolerance, receipt: PrepareReceipt) -> None:
    """Hold what was found in the rows against what the job takes.

    Raises:
        UserError: a share is exceeded.

    """
    read = receipt.train_rows + receipt.eval_rows + receipt.dropped + receipt.fully_masked
    for name, most, found, of, what in (
        ("truncated", tolerance.truncated, receipt.truncated, read, "rows lose their tail: raise maxLength"),
        ("dropped", tolerance.dropped, receipt.dropped, read, "rows are longer than maxLength and left out: raise it"),
        (
            "fullyMasked",
            tolerance.fully_masked,
            receipt.fully_masked,
            read,
            "rows have no token that counts: look at lossOn, columns and chatTemplate",
        ),
        (
            "leftOut",
            tolerance.left_out,
            receipt.left_out,
            receipt.rows,
            (
                "rows say something that the chat template or the tokenizer leaves out, or have an empty answer: look"
                " at chatTemplate and the receipt's notes"
            ),
        ),
        (
            "duplicates",
            tolerance.duplicates,
            receipt.duplicates,
            receipt.train_rows,
            "training rows repeat an earlier one: leave them out",
        ),
        (
            "evalInTrain",
            tolerance.eval_in_train,
            receipt.eval_in_train,
            receipt.eval_rows,
            "evaluation rows are training rows too: the eval loss would measure memory",
        ),
    ):
        share = found / of if of else 0.0
        if most is not None and share > float(most):
            raise UserError(f"{FIELD}.{name}", most, f"is exceeded: {found} of {of} ({share:.1%}) {what}")
