"""Measure the base and the adapter with the tasks of spec.evaluate; an adapter below a limit is not published.

All ranks answer, each a share of the questions; rank 0 has lm-evaluation-harness compute the metrics from the answers
(:mod:`qlora_trainer.tasks`), in the type that the model was trained in.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_api.status import TaskResult
from qlora_trainer.data.batches import eval_batches, eval_sequences
from qlora_trainer.data.tokenized_rows import TokenizedRows, load_sequences
from qlora_trainer.errors import AdapterRejectedError, NonFiniteLossError
from qlora_trainer.liveness.heartbeat import Section
from qlora_trainer.model.loss import call_arguments
from qlora_trainer.tasks.harness_request import DOCUMENTS, ORDER_FILE, Order, TaskOutcome
from qlora_trainer.tasks.prepare_tasks import REQUESTS_FILE, ROWS
from qlora_trainer.tasks.run_harness import run_harness

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_api.spec import EvaluationTask
    from qlora_trainer.training.context import RunState, TrainingContext

log = logging.getLogger(__name__)


def measure_base(context: TrainingContext, run: RunState) -> bool:
    """Measure the base before the first step, where the adapter changes nothing (B is zero). A collective.

    Returns:
        False where a rank was told to stop.

    """
    if context.config.spec.evaluate is None or run.step or run.base_tasks:
        return True
    found = _measure(context, "base")
    if found is None:
        return False
    run.base_tasks = [outcome.model_dump() for outcome in found]
    return True


def measure_adapter(context: TrainingContext, run: RunState) -> list[TaskResult] | None:
    """Measure the adapter that is loaded, and hold it against the limits. A collective.

    Returns:
        None where a rank was told to stop.

    Raises:
        AdapterRejectedError: on all ranks; a task's limit is not reached.

    """
    spec = context.config.spec.evaluate
    if spec is None:
        return []
    found = _measure(context, "adapter")
    if found is None:
        return None
    base = {task["name"]: TaskOutcome(**task) for task in run.base_tasks}
    results = [as_result(outcome, base.get(outcome.name)) for outcome in found]
    context.history.tasks([result.model_dump(by_alias=True) for result in results])
    missed = [
        problem
        for task, outcome in zip(spec.tasks, found, strict=True)
        if (problem := limit_problem(task, outcome, base.get(task.name)))
    ]
    if missed:
        raise AdapterRejectedError(f"spec.evaluate: {'; '.join(missed)}. The adapter is not published")
    return results


def as_result(outcome: TaskOutcome, base: TaskOutcome | None) -> TaskResult:
    """Return the row of status for a task."""
    error = outcome.standard_error
    return TaskResult(
        name=outcome.name,
        metric=outcome.metric,
        base=None if base is None else f"{base.value:.6g}",
        adapter=f"{outcome.value:.6g}",
        standard_error=None if error is None or not math.isfinite(error) else f"{error:.3g}",
        examples=outcome.examples,
    )


def limit_problem(task: EvaluationTask, outcome: TaskOutcome, base: TaskOutcome | None) -> str | None:
    """Say which limit of a task the adapter does not reach; None where it reaches all."""
    result = f"{outcome.metric} of {task.name} is {outcome.value:.4g}"
    if task.minimum is not None and not outcome.value >= float(task.minimum):
        return f"{result}, below the minimum, {task.minimum}"
    if task.maximum is not None and not outcome.value <= float(task.maximum):
        return f"{result}, above the maximum, {task.maximum}"
    if task.not_worse and base is not None:
        as_good = outcome.value >= base.value if outcome.higher_is_better else outcome.value <= base.value
        if not as_good:
            return f"{result}, worse than the base's {base.value:.4g}"
    return None


def _measure(context: TrainingContext, who: str) -> list[TaskOutcome] | None:
    ranks, began = context.ranks, time.monotonic()
    folder = context.prepared.tasks_dir
    assert folder is not None, "Prepare leaves the tasks of a job that has some"
    requests = json.loads((folder / REQUESTS_FILE).read_bytes())
    with ranks.heartbeat.during(Section.EVALUATE):
        answers = _answers(context, folder / ROWS, len(requests))
        if answers is None:
            return None
        outcomes = _scores(context, folder, requests, answers) if ranks.is_first else None
        while outcomes is None and not ranks.sum(0)[0]:  # as long as the first rank computes: no wait is long
            pass
    dumped = [outcome.model_dump() for outcome in outcomes] if outcomes is not None else None
    found = [TaskOutcome(**task) for task in ranks.gather(dumped)[0]]
    values = ", ".join(f"{task.name} {task.metric} {task.value:.4g}" for task in found)
    log.info("the %s reaches %s (%.1f s)", who, values, time.monotonic() - began)
    return found


@torch.no_grad()
def _answers(context: TrainingContext, folder: Path, count: int) -> list[tuple[float, bool]] | None:
    """Return the log-likelihood in nats of each request, and whether it is the most likely; None if told to stop."""
    ranks, size = context.ranks, context.config.batch.micro_batch_size
    rows, sequences = TokenizedRows.load(folder), load_sequences(folder)
    chosen = eval_sequences(len(sequences), size, ranks.world_size, ranks.rank)
    batches = eval_batches(rows, sequences, size, ranks.world_size, ranks.rank)
    total = -(-len(sequences) // (size * ranks.world_size))
    found = [0.0] * (2 * count)
    context.engine.eval()
    try:
        for numbers, batch in context.recorder.count(zip(chosen, batches, strict=True), total, "micro-batches"):
            if ranks.sum(context.stop.is_set)[0]:
                return None
            members = [row for number in numbers for row in sequences.rows(number).tolist()]
            tokens = context.engine(*call_arguments(batch, ranks.device), greedy=True).double().cpu()
            for row, part in zip(members, tokens.split([int(rows.target_counts[row]) for row in members]), strict=True):
                found[2 * row] = -float(part[:, 0].sum())
                found[2 * row + 1] = float(part[:, 1].all())
    finally:
        context.engine.train()
    every = ranks.sum(*found)
    if not all(map(math.isfinite, every)):
        raise NonFiniteLossError("the likelihood of an answer to spec.evaluate is not a finite number")
    return [(value, bool(greedy)) for value, greedy in zip(every[::2], every[1::2], strict=True)]


def _scores(
    context: TrainingContext, folder: Path, requests: Sequence[tuple[str, str]], answers: Sequence[tuple[float, bool]]
) -> list[TaskOutcome]:
    """Have the harness compute the metrics; the other ranks are told once a second that it still does."""
    order = Order.model_validate_json((folder / ORDER_FILE).read_bytes())
    pairs = [(first, then, value, greedy) for (first, then), (value, greedy) in zip(requests, answers, strict=True)]
    with tempfile.TemporaryDirectory(prefix="qlora-tasks-", dir=context.config.cache_dir) as name:
        shutil.copytree(folder / DOCUMENTS, Path(name) / DOCUMENTS)
        outcome = run_harness(Path(name), order, pairs, lambda: context.ranks.sum(0))
    context.ranks.sum(1)
    return outcome.tasks
