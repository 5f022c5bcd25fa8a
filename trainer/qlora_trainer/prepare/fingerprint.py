"""The name of tokenized rows: a hash of all that they follow from."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from qlora_api.spec import DatasetFormat, QLoRAJobSpec
from qlora_trainer.data.formats import needed_columns
from qlora_trainer.data.rows.source import contents
from qlora_trainer.prepare.format_version import FORMAT_VERSION

if TYPE_CHECKING:
    from qlora_trainer.data.formats import Encoder
    from qlora_trainer.data.rows.source import SourceFiles


def data_hash(
    spec: QLoRAJobSpec, encoder: Encoder, tokenizer_hash: str, train: SourceFiles, evaluation: SourceFiles | None
) -> str:
    """Hash contents and settings, wherever the files lie and whatever they are called; SHA-256 as hex.

    Raises:
        UserError: a file cannot be read.

    """
    dataset = spec.dataset
    needed, optional = needed_columns(dataset)
    fraction = dataset.eval.fraction if dataset.eval and evaluation is None else None
    facts: dict[str, Any] = {
        "formatVersion": FORMAT_VERSION,
        "tokenizer": tokenizer_hash,
        "format": dataset.format,
        "columns": [*needed, *optional],
        "chatTemplate": encoder.chat_template if dataset.format is DatasetFormat.MESSAGES else dataset.chat_template,
        "lossOn": dataset.effective_loss_on,
        "maxLength": dataset.max_length,
        "longRows": dataset.long_rows,
        "packing": dataset.packing,
        "heldOut": [fraction, spec.training.seed] if fraction is not None else None,
        "train": contents(train),
        "eval": contents(evaluation) if evaluation else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
