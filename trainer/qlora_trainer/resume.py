"""Writing a checkpoint from all ranks, and taking one up again."""

from __future__ import annotations

import logging
import time

from qlora_trainer import state
from qlora_trainer.attempt import Run, Trainer
from qlora_trainer.checkpoints import Checkpoint, pack_tensors, unpack_tensors
from qlora_trainer.errors import CheckpointError, UserError
from qlora_trainer.history import HISTORY_FILE

log = logging.getLogger(__name__)


def save(trainer: Trainer, run: Run, *, with_eval: bool) -> None:
    """Write a checkpoint: every rank its files, rank 0 the marker when all are there. A collective."""
    ranks, store, engine = trainer.ranks, trainer.checkpoints, trainer.engine
    sharded = trainer.config.spec.parallelism.zero_stage > 0
    run.saved_at = run.step
    with trainer.board.section("Checkpoint"):
        adapter = state.adapter_tensors(trainer.model)
        entries = [store.write_file(run.step, state.rng_file(ranks.rank), pack_tensors(state.rng_tensors()))]
        if sharded or ranks.is_first:
            shard = pack_tensors(state.optimizer_tensors(engine))
            entries.append(store.write_file(run.step, state.optimizer_file(ranks.rank), shard))
        if ranks.is_first:
            entries.append(store.write_file(run.step, state.ADAPTER_FILE, pack_tensors(adapter)))
            trainer.history.sections(trainer.config.attempt, run.step, trainer.board.section_seconds)
            entries.append(store.write_file(run.step, HISTORY_FILE, trainer.history.to_bytes()))
        written = [entry for part in ranks.gather(entries) for entry in part]
        if ranks.is_first:
            base = trainer.prepared.model_revision
            meta = {"run": run.meta, "world_size": ranks.world_size, "sharded": sharded, "base_revision": base}
            store.commit(run.step, written, meta, run.eval_loss if with_eval else None)
        ranks.sum(0)  # no rank goes on before the marker is written
    trainer.saved_at[0] = time.monotonic()


def resume_or_start(trainer: Trainer) -> Run:
    """Take up the newest checkpoint that is whole, or start at step 0. All ranks take the same one."""
    ranks = trainer.ranks
    newest = trainer.checkpoints.newest() if ranks.is_first else None
    step = ranks.gather(newest.step if newest else None)[0]
    if step is None:
        note_attempt(trainer, 0)
        return Run()
    checkpoint = newest or trainer.checkpoints.at(step)
    must_fit(checkpoint, trainer)
    sharded = checkpoint.meta["sharded"]
    state.load_adapter_tensors(trainer.model, unpack_tensors(checkpoint.read(state.ADAPTER_FILE)))
    shard = state.optimizer_file(ranks.rank if sharded else 0)
    state.load_optimizer_tensors(trainer.engine, unpack_tensors(checkpoint.read(shard)))
    if checkpoint.meta["world_size"] == ranks.world_size:
        state.load_rng_tensors(unpack_tensors(checkpoint.read(state.rng_file(ranks.rank))))
    run = Run(**checkpoint.meta["run"])
    trainer.board.update(
        step=run.step, first_step=run.step, eval_loss=as_text(run.eval_loss), best_eval_loss=as_text(run.best_eval_loss)
    )
    if ranks.is_first and any(entry.name == HISTORY_FILE for entry in checkpoint.entries):
        trainer.history.resume(checkpoint.read(HISTORY_FILE))
    note_attempt(trainer, run.step)
    log.info("resumed at step %d of %d", run.step, trainer.total_steps)
    return run


def note_attempt(trainer: Trainer, step: int) -> None:
    config, batch = trainer.config, trainer.config.batch
    trainer.history.attempt(
        config.attempt,
        step,
        worldSize=batch.world_size,
        microBatchSize=batch.micro_batch_size,
        gradientAccumulationSteps=batch.gradient_accumulation_steps,
        gradientCheckpointing=config.gradient_checkpointing,
        device=trainer.board.device,
    )


def must_fit(checkpoint: Checkpoint, trainer: Trainer) -> None:
    """The base is the one the run began on, and a sharded optimizer goes back onto as many ranks as it came from."""
    base = trainer.prepared.model_revision
    if checkpoint.meta["base_revision"] != base:
        raise UserError(
            "spec.model.source",
            trainer.prepared.model_source,
            f"is at revision {base} now, and the run began on {checkpoint.meta['base_revision']}; "
            "name that revision, or start a new run",
        )
    was, now = checkpoint.meta["world_size"], trainer.ranks.world_size
    stage = trainer.config.spec.parallelism.zero_stage
    if checkpoint.meta["sharded"] and was != now:
        raise UserError(
            "spec.parallelism",
            f"{now} ranks",
            f"cannot take up a ZeRO-{stage} checkpoint of {was} ranks: use {was} ranks",
        )
    if checkpoint.meta["sharded"] != (stage > 0):
        raise CheckpointError(
            f"the checkpoint at step {checkpoint.step} was taken under another spec.parallelism.zeroStage"
        )


def as_text(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"
