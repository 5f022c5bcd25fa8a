"""``QLoRASweep.spec``: every field, default and bound."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from pydantic import Field

from qlora_api.base import Model, Rule, decimal, each_once
from qlora_api.spec import QLoRAJobSpec
from qlora_api.sweep.parameters import Parameter

MAX_PARAMETERS = 16
MAX_TRIALS = 1000


class AlgorithmType(StrEnum):
    GRID = "Grid"
    RANDOM = "Random"
    TPE = "TPE"


class AlgorithmSpec(Model):
    """Choice of each trial's parameters. The same seed gives the same trials."""

    type: AlgorithmType = AlgorithmType.TPE
    """Grid: every combination of the choices. Random: independent draws. TPE: the first ten trials are random, later
    ones are drawn where earlier ones did well (tree-structured Parzen estimator, Bergstra et al. 2011)."""
    seed: int = Field(0, ge=0, le=2147483647)
    """Seed of the draws."""


class ObjectiveMetric(StrEnum):
    EVAL_LOSS = "EvalLoss"
    """Lowest evaluation loss: that of the checkpoint that is published."""
    TRAINING_LOSS = "TrainingLoss"
    """Training loss of the last step."""
    TOKENS_PER_SECOND = "TokensPerSecond"
    """Training speed over all ranks."""
    PEAK_MEMORY = "PeakMemory"
    """Highest measured memory of a rank."""

    @property
    def is_maximized(self) -> bool:
        return self is ObjectiveMetric.TOKENS_PER_SECOND


class ObjectiveSpec(Model):
    """Metric by which trials are compared."""

    metric: ObjectiveMetric = ObjectiveMetric.EVAL_LOSS
    """EvalLoss (lowest evaluation loss), TrainingLoss (last step), PeakMemory: lower is better. TokensPerSecond: higher
    is better."""


class EarlyStoppingSpec(Model):
    """Successive halving (Jamieson and Talwalkar 2016).

    All trials train for minSteps, are checkpointed and suspended; the best resume from their checkpoints and train for
    reductionFactor times as many steps, and so on.
    """

    min_steps: int = Field(ge=1, le=1_000_000)
    """Optimizer steps after which trials are compared for the first time. With the metric EvalLoss a multiple of
    training.evaluation.everySteps."""
    reduction_factor: int = Field(3, ge=2, le=16)
    """After each comparison, 1/reductionFactor of the trials continue, and at least one."""


class TrialTemplate(Model):
    """Template of the trials."""

    spec: QLoRAJobSpec
    """Specification of a job with the values of all fields that do not vary. Each trial publishes to
    OUTPUT.DESTINATION/trials/NAME."""


_COMPARED = "trials with different settings cannot be compared; create a new QLoRASweep instead"
_SWEEPS_OWN = {
    "pauseAtStep": "the sweep decides when its trials pause",
    "budgetGpuHours": "set the sweep's spec.budgetGpuHours instead",
    "ttlSecondsAfterFinished": (
        "a deleted trial would be trained again; set the sweep's spec.ttlSecondsAfterFinished instead"
    ),
}
"""Fields of the template's policy that a sweep has itself, each with the reason."""
MAX_TRIALS_TRANSITION = {
    "rule": "!has(self.earlyStopping) || self.maxTrials == oldSelf.maxTrials",
    "message": "maxTrials is immutable with earlyStopping: the number of trials that continue depends on it",
    "fieldPath": ".maxTrials",
}
"""A rule of changes, which only the API server can hold."""


def _must_not_be_set(field: str, why: str) -> Rule:
    place = f"template.spec.policy.{field}"
    return Rule(f"!has(self.{place})", f"{place} must not be set: {why}", place, lambda s: s.at(place) is None)


class QLoRASweepSpec(Model):
    """Specification of a sweep."""

    template: TrialTemplate
    parameters: list[Parameter] = Field(min_length=1, max_length=MAX_PARAMETERS)
    """Fields that vary, each once. In a grid, the last one varies fastest."""
    algorithm: AlgorithmSpec = AlgorithmSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    early_stopping: EarlyStoppingSpec | None = None
    """Suspend trials that do worse than others. Default: all trials train to the end."""
    max_trials: int = Field(ge=1, le=MAX_TRIALS)
    """Maximum number of trials. A grid must not have more combinations."""
    parallel_trials: int = Field(1, ge=1, le=100)
    """Trials that may run at the same time. 'qlora sweep' runs one after the other, each on the whole machine; the
    trials are the same."""
    max_failed_trials: int = Field(3, ge=0, le=MAX_TRIALS)
    """If more trials than this fail, the sweep fails."""
    budget_gpu_hours: decimal(0, 1e9, low_included=False) | None = None  # type: ignore[valid-type]
    """GPU-hours of all trials together; waiting does not count. When they are used up, running trials save a checkpoint
    and the sweep stops. Raise the value to resume it. On a machine without GPUs, hours of CPU ranks."""
    suspend: bool = False
    """true: running trials save a checkpoint and free their GPUs, and no trial is created. false: resume. Not used by
    'qlora sweep'."""
    ttl_seconds_after_finished: int | None = Field(None, ge=0, le=31536000)
    """Delete the finished sweep with its trials after this time; adapters are kept. Default: never. Not used by 'qlora
    sweep'."""

    immutable: ClassVar = dict.fromkeys(
        ("template", "parameters", "algorithm", "objective", "earlyStopping"), _COMPARED
    )
    rules: ClassVar = (
        each_once("parameters", "path", "parameters must not have a path twice"),
        *(_must_not_be_set(field, why) for field, why in _SWEEPS_OWN.items()),
        Rule(
            "self.algorithm.type != 'Grid' || self.parameters.all(p, !has(p.range))",
            "algorithm Grid needs choices for every parameter; Random and TPE take ranges too",
            "algorithm.type",
            lambda s: s.algorithm.type is not AlgorithmType.GRID or all(p.choices is not None for p in s.parameters),
        ),
        Rule(
            "self.objective.metric != 'EvalLoss' || has(self.template.spec.dataset.eval)",
            "metric EvalLoss needs evaluation rows: set template.spec.dataset.eval",
            "objective.metric",
            lambda s: s.objective.metric is not ObjectiveMetric.EVAL_LOSS or s.template.spec.dataset.eval is not None,
        ),
        Rule(
            "!has(self.earlyStopping) || self.objective.metric != 'EvalLoss' ||"
            " (has(self.template.spec.training.evaluation.everySteps) &&"
            " self.earlyStopping.minSteps % self.template.spec.training.evaluation.everySteps == 0)",
            "earlyStopping.minSteps must be a multiple of template.spec.training.evaluation.everySteps, which must be "
            "set: trials are compared after an evaluation",
            "earlyStopping.minSteps",
            lambda s: (
                s.early_stopping is None
                or s.objective.metric is not ObjectiveMetric.EVAL_LOSS
                or (
                    (every := s.template.spec.training.evaluation.every_steps) is not None
                    and s.early_stopping.min_steps % every == 0
                )
            ),
        ),
        Rule(
            "!has(self.earlyStopping) || !has(self.template.spec.training.maxSteps) ||"
            " self.earlyStopping.minSteps < self.template.spec.training.maxSteps",
            "earlyStopping.minSteps must be less than template.spec.training.maxSteps",
            "earlyStopping.minSteps",
            lambda s: (
                s.early_stopping is None
                or s.template.spec.training.max_steps is None
                or s.early_stopping.min_steps < s.template.spec.training.max_steps
            ),
        ),
        Rule(
            "!has(self.earlyStopping) ||"
            " !self.parameters.exists(p, p.path == 'training.epochs' || p.path == 'training.maxSteps')",
            "earlyStopping compares trials at the same steps: training.epochs and training.maxSteps must not vary",
            "earlyStopping",
            lambda s: (
                s.early_stopping is None
                or all(p.path not in ("training.epochs", "training.maxSteps") for p in s.parameters)
            ),
        ),
        Rule(
            "!self.parameters.exists(p, p.path == 'training.seed') || !has(self.template.spec.dataset.eval) ||"
            " !has(self.template.spec.dataset.eval.fraction)",
            "training.seed also draws dataset.eval.fraction, and trials must be evaluated on the same rows: give "
            "template.spec.dataset.eval a source, or do not vary the seed",
            "parameters",
            lambda s: (
                all(p.path != "training.seed" for p in s.parameters)
                or s.template.spec.dataset.eval is None
                or s.template.spec.dataset.eval.fraction is None
            ),
        ),
        Rule(
            "!self.template.spec.suspend",
            "template.spec.suspend must not be set: the sweep suspends and resumes its trials",
            "template.spec.suspend",
            lambda s: not s.template.spec.suspend,
        ),
    )
