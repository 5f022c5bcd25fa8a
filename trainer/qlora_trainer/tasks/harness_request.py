"""The order to the process that runs lm-evaluation-harness, and its result: files of one folder.

``order.json`` is an :class:`Order`; ``documents/`` holds the tasks' rows, and ``answers.json`` the model's answers, if
there are some; ``result.json`` is an :class:`HarnessResult`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

DOCUMENTS, ORDER_FILE, ANSWERS_FILE, RESULT_FILE = "documents", "order.json", "answers.json", "result.json"
ANSWER_TYPES = ("multiple_choice", "loglikelihood")
"""Values of ``output_type``: answers that are compared by their likelihood."""
Answer = tuple[str, str, float, bool]
"""Context, continuation, log-likelihood of the continuation in nats, whether each of its tokens is the likeliest."""


class OrderedTask(BaseModel):
    """A task to ask."""

    name: str
    few_shot: int | None = None
    metric: str | None = None
    definition: dict[str, Any] | None = None
    """None: one of the harness's own."""


class Order(BaseModel):
    """The work of one process."""

    tasks: list[OrderedTask]
    limit: int | None = None


class TaskOutcome(BaseModel):
    """The metric of one task."""

    name: str
    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool
    examples: int


class HarnessResult(BaseModel):
    """The requests and metrics of an order, or why there are none."""

    tasks: list[TaskOutcome] = []
    requests: list[tuple[str, str]] = []
    """(context, continuation), each once: how likely is the second after the first?"""
    task: str = ""
    problem: str = ""
    """Reason for which ``task`` cannot be evaluated, as the end of a sentence about it; empty if there is none."""
