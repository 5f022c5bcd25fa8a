"""``QLoRAJob.spec``: every field, default, bound and reason. The CRD and ``qlora explain`` are generated from here.

Read in the order of a manifest: model and dataset (``data.py``), quantization, lora and training (``learning.py``),
parallelism, checkpoint, output, policy and scheduling (``running.py``), evaluate (``evaluate.py``), tracking
(``tracking.py``); what holds between them stands here.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from qlora_api.base import Model, Rule, each_once
from qlora_api.spec.data import (
    REQUIRED_COLUMNS,
    Columns,
    DatasetFormat,
    DatasetSource,
    DatasetSpec,
    EvaluationData,
    LongRows,
    LossOn,
    ModelSpec,
    Tolerance,
)
from qlora_api.spec.evaluate import EvaluateSpec, EvaluationTask
from qlora_api.spec.learning import (
    ComputeType,
    EvaluationSpec,
    GradientCheckpointing,
    LoRABias,
    LoRASpec,
    Optimizer,
    QuantizationSpec,
    QuantizationType,
    Schedule,
    TrainingSpec,
    is_matched,
)
from qlora_api.spec.running import (
    CheckpointSpec,
    Gang,
    Merge,
    Offload,
    OnOutOfMemory,
    OutputSpec,
    ParallelismSpec,
    PolicySpec,
    SchedulingSpec,
    Toleration,
)
from qlora_api.spec.tracking import SinkType, TrackingSink
from qlora_api.spec.values import REMOTE_SCHEMES, STORE_SCHEMES

__all__ = [
    "REMOTE_SCHEMES",
    "REQUIRED_COLUMNS",
    "STORE_SCHEMES",
    "CheckpointSpec",
    "Columns",
    "ComputeType",
    "DatasetFormat",
    "DatasetSource",
    "DatasetSpec",
    "EvaluateSpec",
    "EvaluationData",
    "EvaluationSpec",
    "EvaluationTask",
    "Gang",
    "GradientCheckpointing",
    "LoRABias",
    "LoRASpec",
    "LongRows",
    "LossOn",
    "Merge",
    "ModelSpec",
    "Offload",
    "OnOutOfMemory",
    "Optimizer",
    "OutputSpec",
    "ParallelismSpec",
    "PolicySpec",
    "QLoRAJobSpec",
    "QuantizationSpec",
    "QuantizationType",
    "Schedule",
    "SchedulingSpec",
    "SinkType",
    "Tolerance",
    "Toleration",
    "TrackingSink",
    "TrainingSpec",
    "is_matched",
]

_RESUME = "a resumed run must match its checkpoint; create a new QLoRAJob instead"


class QLoRAJobSpec(Model):
    """Specification of a fine-tuning job."""

    model: ModelSpec
    dataset: DatasetSpec
    quantization: QuantizationSpec = QuantizationSpec()
    lora: LoRASpec = LoRASpec()
    training: TrainingSpec
    parallelism: ParallelismSpec = ParallelismSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    output: OutputSpec
    evaluate: EvaluateSpec | None = None
    policy: PolicySpec = PolicySpec()
    scheduling: SchedulingSpec = SchedulingSpec()
    tracking: list[TrackingSink] = Field([], max_length=3)
    """Tracking tools that get the run's parameters, metrics and artifacts, at most one of each type. A tool that cannot
    be reached does not delay training; it gets the missing data once it can be reached again. May be changed while the
    job runs: the next attempt takes the new list."""
    suspend: bool = False
    """true: save a checkpoint, free the GPUs and wait. false: resume."""

    immutable: ClassVar = dict.fromkeys(
        ("model", "dataset", "quantization", "lora", "training", "parallelism", "evaluate"), _RESUME
    )
    rules: ClassVar = (
        Rule(
            "self.training.globalBatchSize % (self.parallelism.workers * self.parallelism.gpusPerWorker) == 0",
            "globalBatchSize must be a multiple of parallelism.workers × parallelism.gpusPerWorker",
            "training.globalBatchSize",
            lambda s: s.training.global_batch_size % (s.parallelism.workers * s.parallelism.gpus_per_worker) == 0,
        ),
        Rule(
            "!has(self.parallelism.minWorkers) || self.training.globalBatchSize %"
            " (self.parallelism.minWorkers * self.parallelism.gpusPerWorker) == 0",
            "globalBatchSize must be a multiple of parallelism.minWorkers × parallelism.gpusPerWorker",
            "parallelism.minWorkers",
            lambda s: (
                s.parallelism.min_workers is None
                or s.training.global_batch_size % (s.parallelism.min_workers * s.parallelism.gpus_per_worker) == 0
            ),
        ),
        Rule(
            "!has(self.training.microBatchSize) || self.training.globalBatchSize %"
            " (self.training.microBatchSize * self.parallelism.workers * self.parallelism.gpusPerWorker) == 0",
            "globalBatchSize must be a multiple of microBatchSize × parallelism.workers × parallelism.gpusPerWorker",
            "training.microBatchSize",
            lambda s: (
                s.training.micro_batch_size is None
                or s.training.global_batch_size
                % (s.training.micro_batch_size * s.parallelism.workers * s.parallelism.gpus_per_worker)
                == 0
            ),
        ),
        Rule(
            "!has(self.training.evaluation.patience) || has(self.dataset.eval)",
            "training.evaluation.patience needs evaluation rows: set dataset.eval",
            "training.evaluation.patience",
            lambda s: s.training.evaluation.patience is None or s.dataset.eval is not None,
        ),
        Rule(
            "!has(self.training.evaluation.everySteps) || has(self.dataset.eval)",
            "training.evaluation.everySteps needs evaluation rows: set dataset.eval",
            "training.evaluation.everySteps",
            lambda s: s.training.evaluation.every_steps is None or s.dataset.eval is not None,
        ),
        Rule(
            "self.quantization.type != 'INT8' || self.parallelism.zeroStage < 3",
            "quantization.type INT8 cannot be partitioned: parallelism.zeroStage must be 0, 1 or 2",
            "parallelism.zeroStage",
            lambda s: s.quantization.type is not QuantizationType.INT8 or s.parallelism.zero_stage < 3,
        ),
        Rule(
            "self.quantization.type != 'INT8' || !self.lora.dora",
            "lora.dora needs the norms of the base's weights, which are not available with quantization.type INT8: "
            "use NF4, FP4 or None",
            "lora.dora",
            lambda s: s.quantization.type is not QuantizationType.INT8 or not s.lora.dora,
        ),
        each_once("tracking", "type", "tracking must have at most one entry of each type", may_be_absent=True),
    )
