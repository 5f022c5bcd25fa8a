"""Prepare: everything that can be known without a GPU. ``python -m qlora_trainer.prepare CONFIG.json``

Fetches and checks the model and the rows, tokenizes once, finds out that the adapter's targets exist and that the
destination can be written. The result is content-addressed: a second call finds it done. What it decided is in the
termination message; the last line on stdout is the :class:`~qlora_api.contract.PrepareReceipt` as JSON.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil

from qlora_api.contract import ExitCode, PrepareReceipt, TerminationMessage, TrainerConfig
from qlora_api.status import PrepareResult, Reason
from qlora_trainer.chat import load_tokenizer
from qlora_trainer.data.prepare import prepare_data
from qlora_trainer.errors import UserError
from qlora_trainer.fetch import FetchedModel, fetch_model, fetch_rows, tokenizer_hash
from qlora_trainer.model import add_lora, check_base, meta_model
from qlora_trainer.outcome import LastSeen, guarded
from qlora_trainer.prepared import Prepared
from qlora_trainer.published import check_destination


def prepare(config: TrainerConfig) -> PrepareReceipt:
    """Check and fetch all that the ranks need, and leave the record of it.

    Raises:
        UserError: names the field that must change.
        StorageError: a source or the destination is out of reach.

    """
    spec, cache = config.spec, Path(config.cache_dir)
    check_destination(spec.output.destination, config.job.uid)
    model = fetch_model(spec.model.source, cache)
    _check_architecture(config, model)
    train_rows = fetch_rows(spec.dataset.train.source, "spec.dataset.train.source", cache)
    own_eval = spec.dataset.eval.source if spec.dataset.eval else None
    eval_rows = fetch_rows(own_eval, "spec.dataset.eval.source", cache) if own_eval else None
    tokenizer = load_tokenizer(model.path, spec.dataset.chat_template)
    data = prepare_data(spec, tokenizer, tokenizer_hash(model.path), train_rows, eval_rows, cache)
    Prepared(model.path, model.source, model.revision, data.folder).write(config)
    return data.receipt


def _check_architecture(config: TrainerConfig, model: FetchedModel) -> None:
    """Build the architecture without weights, and look for the adapter's targets and room for the positions."""
    check_base(model.path, config.spec.quantization)
    skeleton = meta_model(model.path)
    add_lora(skeleton, config.spec.lora, config.spec.training.seed, model.source)
    positions = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    longest = config.spec.dataset.max_length
    if positions is not None and longest > positions:
        raise UserError("spec.dataset.maxLength", longest, f"is more than the {positions} positions of {model.source}")


def prepared_message(config: TrainerConfig, receipt: PrepareReceipt, prepared: Prepared | None) -> TerminationMessage:
    """The last word of a Prepare that found all well."""
    assert prepared is not None
    result = PrepareResult(
        model_revision=prepared.model_revision,
        data_hash=receipt.data_hash,
        train_rows=receipt.train_rows,
        train_tokens=receipt.train_tokens,
        train_sequences=receipt.train_sequences,
        eval_rows=receipt.eval_rows,
        truncated=receipt.truncated,
        dropped=receipt.dropped,
        fully_masked=receipt.fully_masked,
        duplicates=receipt.duplicates,
        packing_efficiency=f"{receipt.packing_efficiency:.4f}",
        batch=config.batch,
        gradient_checkpointing=config.gradient_checkpointing,
        seconds=f"{time.time() - psutil.Process().create_time():.1f}",
    )
    return TerminationMessage(exit_code=ExitCode.DONE, reason=Reason.COMPLETED, prepared=result)


def main() -> int:
    config = TrainerConfig.model_validate_json(Path(sys.argv[1]).read_bytes())

    def work(_: LastSeen) -> TerminationMessage:
        receipt = prepare(config)
        print(receipt.model_dump_json(by_alias=True))  # noqa: T201 the receipt is the output
        return prepared_message(config, receipt, Prepared.read(config))

    return guarded(config, work)


if __name__ == "__main__":
    sys.exit(main())
