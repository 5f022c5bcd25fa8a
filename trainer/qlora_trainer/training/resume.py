"""Writing a checkpoint from all ranks, and taking one up again."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from qlora_api.spec import ComputeType
from qlora_trainer.checkpoint import engine_state
from qlora_trainer.checkpoint.checkpoint_store import Checkpoint, FileEntry, pack_tensors, unpack_tensors
from qlora_trainer.checkpoint.reshard import reshard
from qlora_trainer.engine.loss_scale import LossScale
from qlora_trainer.errors import CheckpointError, UserError
from qlora_trainer.liveness.heartbeat import Section
from qlora_trainer.publish.software_versions import software_versions
from qlora_trainer.reporting.training_history import HISTORY_FILE
from qlora_trainer.storage.fetch import same_revision
from qlora_trainer.training.context import RunState, TrainingContext

log = logging.getLogger(__name__)


def save(context: TrainingContext, run: RunState, *, with_eval: bool) -> None:
    """Write a checkpoint: every rank its files, rank 0 the marker when all are there. A collective."""
    ranks, store, engine = context.ranks, context.checkpoints, context.engine
    if run.saved_at == run.step:  # an attempt before saved it, and was stopped before its evaluation
        if ranks.is_first:
            store.amend(run.step, {"run": run.meta}, run.eval_loss if with_eval else None)
        ranks.sum(0)
        return
    sharded = context.config.spec.parallelism.zero_stage > 0
    run.saved_at = run.step
    start = time.monotonic()
    entries: list[FileEntry] = []

    def write(name: str, data: bytes) -> None:
        entries.append(store.write_file(run.step, name, data))
        ranks.heartbeat.beat()

    with context.ranks.heartbeat.during(Section.CHECKPOINT):
        adapter = engine_state.adapter_tensors(context.model)
        if sharded or ranks.is_first:
            write(engine_state.optimizer_file(ranks.rank), pack_tensors(engine_state.optimizer_tensors(engine)))
        if ranks.is_first:
            write(engine_state.ADAPTER_FILE, pack_tensors(adapter))
            context.history.sections(context.config.attempt, run.step, context.ranks.heartbeat.phase_seconds())
            write(HISTORY_FILE, context.history.to_bytes())
        parts = ranks.gather([asdict(entry) for entry in entries])
        written = [FileEntry(**entry) for part in parts for entry in part]
        if ranks.is_first:
            meta = {
                "run": run.meta,
                "world_size": ranks.world_size,
                "sharded": sharded,
                "compute_type": context.config.spec.quantization.compute_type,
                "base_revision": context.prepared.model_revision,
                "data_hash": context.data.receipt.data_hash,
            }
            store.commit(run.step, written, meta, run.eval_loss if with_eval else None)
        ranks.sum(0)  # no rank goes on before the marker is written
    run.clock.restart()
    context.recorder.save_took(run.clock.began - start)


def resume_or_start(context: TrainingContext) -> RunState:
    """Take up the newest checkpoint that is whole, or start at step 0. A collective."""
    ranks, checkpoint = context.ranks, context.resumes
    scaled = context.config.spec.quantization.compute_type is ComputeType.FLOAT16
    if checkpoint is None:
        note_attempt(context, 0)
        return RunState(loss_scale=LossScale() if scaled else None)
    check_fits(checkpoint, context)
    engine_state.load_adapter_tensors(context.model, unpack_tensors(checkpoint.read(engine_state.ADAPTER_FILE)))
    engine_state.load_optimizer_tensors(context.engine, own_shard(checkpoint, context))
    run = RunState.from_meta(checkpoint.meta["run"])
    context.recorder.update(
        step=run.step, first_step=run.step, eval_loss=as_text(run.eval_loss), best_eval_loss=as_text(run.best_eval_loss)
    )
    if ranks.is_first and any(entry.name == HISTORY_FILE for entry in checkpoint.entries):
        context.history.resume(checkpoint.read(HISTORY_FILE))
    note_attempt(context, run.step)
    log.info("resumed at step %d of %d", run.step, context.total_steps)
    return run


def note_attempt(context: TrainingContext, step: int) -> None:
    config, batch = context.config, context.config.batch
    context.history.attempt(
        config.attempt,
        step,
        worldSize=batch.world_size,
        microBatchSize=batch.micro_batch_size,
        gradientAccumulationSteps=batch.gradient_accumulation_steps,
        gradientCheckpointing=config.gradient_checkpointing,
        computeType=config.spec.quantization.compute_type,
        device=context.recorder.device,
        environment=software_versions(),
    )


def own_shard(checkpoint: Checkpoint, context: TrainingContext) -> Mapping[str, Tensor]:
    """This rank's part of the optimizer, put together from other ranks' parts where their number was another."""

    def read(shard: int) -> dict[str, Tensor]:
        return unpack_tensors(checkpoint.read(engine_state.optimizer_file(shard)))

    was, ranks = checkpoint.meta["world_size"], context.ranks
    if not checkpoint.meta["sharded"]:
        return read(0)
    if was == ranks.world_size:
        return read(ranks.rank)
    log.info("the checkpoint of %d ranks is taken up by %d", was, ranks.world_size)
    return reshard(read, was, ranks.rank, engine_state.partition_sizes(context.engine))


def check_fits(checkpoint: Checkpoint, context: TrainingContext) -> None:
    """Refuse a checkpoint that cannot be gone on from.

    Raises:
        UserError: base or rows are other ones than those the run began on, or the number of ranks is under ZeRO-3.
        CheckpointError: it was taken under another ZeRO stage.

    """
    meta, prepared, spec = checkpoint.meta, context.prepared, context.config.spec
    if not same_revision(prepared.model_source, prepared.model_revision, meta["base_revision"]):
        raise UserError(
            "spec.model.source",
            prepared.model_source,
            f"is at revision {prepared.model_revision} now, and the run began on {meta['base_revision']}; "
            "name that revision, or start a new run",
        )
    rows = context.data.receipt.data_hash
    if meta["data_hash"] != rows:
        raise UserError(
            "spec.dataset.train.source",
            spec.dataset.train.source,
            f"holds other rows now (data {rows[:12]}) than those the run began on ({meta['data_hash'][:12]}); "
            "put them back, or start a new run",
        )
    was, now, stage = meta["world_size"], context.ranks.world_size, spec.parallelism.zero_stage
    if stage == 3 and was != now:
        raise UserError(
            "spec.parallelism.zeroStage",
            stage,
            f"binds a run to its number of ranks, as every weight is partitioned: go on with {was} ranks instead of "
            f"{now}, or start a new run with zeroStage 0, 1 or 2, which resume on any number",
        )
    if meta["sharded"] != (stage > 0):
        raise CheckpointError(
            f"the checkpoint at step {checkpoint.step} was taken under another spec.parallelism.zeroStage"
        )


def as_text(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"
