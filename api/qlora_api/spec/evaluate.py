"""Fields of the evaluation tasks: what the base and the adapter are measured with before the adapter is published."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, StringConstraints

from qlora_api.base import Model, Rule, decimal, each_once
from qlora_api.spec.values import Source

TaskName = Annotated[str, StringConstraints(max_length=128, pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.,+-]*[A-Za-z0-9+])?$")]
MetricName = Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
Bound = decimal(0, 1e9)


class EvaluationTask(Model):
    """A task of EleutherAI's lm-evaluation-harness, and what the adapter must reach in it."""

    name: TaskName
    """Name of the task, such as arc_easy. The task must score answers by likelihood, as multiple-choice tasks do."""
    few_shot: int | None = Field(None, ge=0, le=64)
    """Examples with answers before each question. Default: the task's own number."""
    metric: MetricName | None = None
    """Metric to report and to apply the limits below to, such as acc_norm. Default: the task's first."""
    minimum: Bound | None = None  # type: ignore[valid-type]
    """The adapter is not published if its value is below this."""
    maximum: Bound | None = None  # type: ignore[valid-type]
    """The adapter is not published if its value is above this."""
    not_worse: bool = False
    """true: the adapter is not published if its value is worse than the base's."""
    rules: ClassVar = (
        Rule(
            "!has(self.minimum) || !has(self.maximum) || double(self.minimum) <= double(self.maximum)",
            "minimum must be at most maximum",
            "minimum",
            lambda t: t.minimum is None or t.maximum is None or float(t.minimum) <= float(t.maximum),
        ),
    )


class EvaluateSpec(Model):
    """Tasks that base and adapter are evaluated on, in the trained quantization."""

    tasks: list[EvaluationTask] = Field(min_length=1, max_length=8)
    """The tasks. The base is measured before the first step, the adapter before it is published."""
    folder: Source | None = None
    """Folder with your own task definitions for lm-evaluation-harness (YAML) and their rows. Read with the
    credentials of dataset.train. Definitions that name Python code are refused."""
    limit: int | None = Field(None, ge=1, le=1_000_000)
    """Maximum number of examples of each task; the first ones are used. Default: all."""
    rules: ClassVar = (each_once("tasks", "name", "tasks must name each task once"),)
