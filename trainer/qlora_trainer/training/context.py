"""Build what one attempt works with: the loaded model in its engine, data, checkpoints, and the training's state."""

from __future__ import annotations

import hashlib
import signal
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from qlora_api.contract import TrainerConfig
from qlora_api.spec import ComputeType
from qlora_trainer.checkpoint.checkpoint_store import Checkpoint, CheckpointStore
from qlora_trainer.data.batches import Batches, Step
from qlora_trainer.engine.deepspeed_engine import wrap_deepspeed
from qlora_trainer.engine.loss_scale import LossScale
from qlora_trainer.errors import TrainerError
from qlora_trainer.liveness.heartbeat import node_name
from qlora_trainer.model.device.compute_type import OF_OLD_CHECKPOINTS, slow_bf16_warning, with_compute_type
from qlora_trainer.model.flops import flops_per_token
from qlora_trainer.prepare.local_copy import PreparedInputs
from qlora_trainer.prepare.tokenize_rows import PreparedData, load_prepared_data
from qlora_trainer.ranks import Ranks
from qlora_trainer.reporting.metrics import MetricsRecorder
from qlora_trainer.reporting.pace import Pace
from qlora_trainer.reporting.training_history import TrainingHistory
from qlora_trainer.storage.authentication import Authenticator
from qlora_trainer.tracking.journal import journal_of_environment
from qlora_trainer.training.load_model import load_model


class StopFlag:
    """Set by SIGTERM; ranks agree on it at the end of a step."""

    def __init__(self) -> None:
        self.is_set = False
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, *_: Any) -> None:
        self.is_set = True


@dataclass
class CheckpointClock:
    """Tells when the next checkpoint is due by time. Rank 0's counts; all ranks are told at the end of a step."""

    began: float = field(default_factory=time.monotonic)
    is_due: bool = False

    def has_run(self, minutes: int) -> bool:
        return time.monotonic() - self.began > 60 * minutes

    def restart(self) -> None:
        self.began, self.is_due = time.monotonic(), False


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one optimizer step, the same on all ranks but for the times."""

    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    data_seconds: float
    """Part of ``seconds`` spent waiting for the next rows."""


@dataclass
class RunState:
    """State of the training; all but the clock is in a checkpoint's ``meta``."""

    step: int = 0
    tokens: int = 0
    base_eval_loss: float | None = None
    """Loss of the base alone: before the first step B is zero."""
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    evaluations_without_gain: int = 0
    evaluated_at: int = -1
    """Step of the newest evaluation."""
    saved_at: int = -1
    """Step of the newest checkpoint."""
    rows_sha256: str = ""
    """Hash over the rows of all steps so far, in their order: equal where the same rows were seen in the same order."""
    loss_scale: LossScale | None = None
    """Loss scale, for a base that computes in float16."""
    base_tasks: list[dict[str, Any]] = field(default_factory=list)
    """Results of the base in the tasks of spec.evaluate, each as the fields of TaskOutcome."""
    clock: CheckpointClock = field(default_factory=CheckpointClock, compare=False)

    @property
    def meta(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "clock"}

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> RunState:
        """Read what :attr:`meta` wrote; an older version wrote fewer fields, a newer one may write more."""
        known = {f.name: meta[f.name] for f in fields(cls) if f.name in meta and f.name != "clock"}
        if known.get("loss_scale") is not None:
            known["loss_scale"] = LossScale(**known["loss_scale"])
        return cls(**known)

    def advance(self, step: Step) -> None:
        """Update the state after a finished step."""
        self.step += 1
        self.tokens += step.tokens
        self.rows_sha256 = hashlib.sha256(self.rows_sha256.encode() + step.rows.tobytes()).hexdigest()

    def record_evaluation(self, eval_loss: float) -> bool:
        """Update the state after an evaluation; return whether it is the best so far."""
        best = self.best_eval_loss is None or eval_loss < self.best_eval_loss
        self.eval_loss = eval_loss
        self.best_eval_loss = eval_loss if best else self.best_eval_loss
        self.evaluations_without_gain = 0 if best else self.evaluations_without_gain + 1
        return best


@dataclass(frozen=True)
class TrainingContext:
    """Everything that an attempt works with. Built once by :func:`build`."""

    config: TrainerConfig
    ranks: Ranks
    recorder: MetricsRecorder
    prepared: PreparedInputs
    data: PreparedData
    engine: Any
    batches: Batches
    checkpoints: CheckpointStore
    total_steps: int
    stop: StopFlag
    pace: Pace
    resumes: Checkpoint | None
    """Checkpoint from which the attempt resumes; None for a fresh start."""
    history: TrainingHistory

    @property
    def model(self) -> Any:
        """The PEFT model inside DeepSpeed."""
        return self.engine.module.model

    @property
    def steps_between_evaluations(self) -> int:
        return self.config.spec.training.evaluation.every_steps or self.batches.steps_per_epoch

    @property
    def steps_between_checkpoints(self) -> int:
        return self.config.spec.checkpoint.every_steps or self.batches.steps_per_epoch


def build(config: TrainerConfig, ranks: Ranks, recorder: MetricsRecorder, stop: StopFlag) -> TrainingContext:
    """Load the base, add the adapter, wrap both in DeepSpeed, and open data and checkpoints."""
    prepared = _read_prepared(config)
    checkpoints = CheckpointStore(
        config.checkpoint_uri,
        config.job.uid,
        config.spec.checkpoint.keep,
        config.attempt,
        authenticator=Authenticator.of(config),
    )
    resumes = newest_checkpoint(checkpoints, ranks)
    config = with_compute_type(config, ranks, compute_type_of(resumes))
    spec = config.spec
    recorder.update(compute_type=spec.quantization.compute_type)
    if ranks.is_first and (warning := slow_bf16_warning(spec.quantization, ranks.device)):
        recorder.warn(warning)
    loss = load_model(config, prepared, ranks, recorder)
    recorder.stage("setting up DeepSpeed")
    data = load_prepared_data(prepared.data_dir)
    receipt = data.receipt
    cost = flops_per_token(loss.model, data.train.lengths, receipt.train_target_tokens / max(1, receipt.train_tokens))
    if cost is not None:
        recorder.set("qlora_flops_per_token", cost)
    engine = wrap_deepspeed(loss, spec.training, spec.parallelism, config.batch, ranks.device)
    batches = Batches(data.train, data.train_packs, config.batch, ranks.rank, spec.training.seed)
    total_steps = spec.training.max_steps or (spec.training.epochs or 0) * batches.steps_per_epoch
    recorder.set("qlora_steps_planned", total_steps)
    recorder.update(total_steps=total_steps)
    pace = Pace(ranks, ranks.gather(node_name()))
    history = TrainingHistory(journal_of_environment() if ranks.is_first else None)
    return TrainingContext(
        config, ranks, recorder, prepared, data, engine, batches, checkpoints, total_steps, stop, pace, resumes, history
    )


def _read_prepared(config: TrainerConfig) -> PreparedInputs:
    prepared = PreparedInputs.read(config)
    if prepared is None:
        raise TrainerError(
            f"nothing was prepared for {config.job.name} in {config.cache_dir}: run qlora_trainer.prepare first"
        )
    return prepared


def newest_checkpoint(store: CheckpointStore, ranks: Ranks) -> Checkpoint | None:
    """Find the newest checkpoint that is whole; all ranks take the same one. A collective."""
    newest = store.newest() if ranks.is_first else None
    step = ranks.gather(newest.step if newest else None)[0]
    return None if step is None else newest or store.at(step)


def compute_type_of(checkpoint: Checkpoint | None) -> ComputeType | None:
    """Return the type in which a checkpoint's run computes; None without a checkpoint."""
    return None if checkpoint is None else ComputeType(checkpoint.meta.get("compute_type", OF_OLD_CHECKPOINTS))
