"""lm-evaluation-harness in a process of its own: ``python -m qlora_trainer.tasks.harness FOLDER``

It has no model. In Prepare it gets the tasks' rows, and writes what the model will be asked; with the answers it runs
the same way again, from the rows that it kept, and computes the metrics. So a task whose metrics cannot be computed
ends Prepare. The process has no credentials, and renders templates in a sandbox: definitions may be a stranger's. Its
files are those of :mod:`qlora_trainer.tasks.harness_request`.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from qlora_trainer.tasks.harness_request import (
    ANSWER_TYPES,
    ANSWERS_FILE,
    DOCUMENTS,
    ORDER_FILE,
    RESULT_FILE,
    Answer,
    HarnessResult,
    Order,
    OrderedTask,
    TaskOutcome,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PROCESSOR_SECONDS = 3600
MOST_DOCUMENT_BYTES = 256 << 20
"""Maximum size of the rows of one task."""
MOST_REQUESTS = 1_000_000
BOOTSTRAP_ITERATIONS = 1000
"""For standard errors of metrics that have no formula of their own."""
FEW_SHOT_SEED = 1234
"""The harness's own default."""
SPLITS_FILE = "splits.json"
log = logging.getLogger(__name__)


class TaskError(Exception):
    """A task cannot be asked; ``str()`` completes the sentence about it."""


def run(folder: Path) -> HarnessResult:
    """Ask the tasks of the order in ``folder``, or, where there are answers, score them."""
    order = Order.model_validate_json((folder / ORDER_FILE).read_bytes())
    answers_file = folder / ANSWERS_FILE
    model = RecordingModel(json.loads(answers_file.read_bytes()) if answers_file.exists() else None)
    utils.env = sandbox()
    outcome = HarnessResult()
    for number, task in enumerate(order.tasks):
        try:
            outcome.tasks.append(_evaluate(task, model, order.limit, folder / DOCUMENTS / f"task{number}"))
        except TaskError as error:
            return HarnessResult(task=task.name, problem=str(error))
        except Exception as error:
            log.exception("%s", task.name)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            return HarnessResult(task=task.name, problem=f"cannot be asked: {reason}")
    outcome.requests = list(model.asked)
    return outcome


def sandbox() -> ImmutableSandboxedEnvironment:
    """Return the harness's environment of templates, from which no Python is reached."""
    environment = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["regex_replace"] = utils.regex_replace
    return environment


class RecordingModel(LM):  # type: ignore[misc]
    """A model of the harness that gives the answers it has, or none yet, and remembers what it was asked."""

    def __init__(self, answers: list[Answer] | None) -> None:
        super().__init__()
        self.asked: dict[tuple[str, str], None] = {}
        self.knows = answers is not None
        self._answers = {(context, text): (value, greedy) for context, text, value, greedy in answers or ()}

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether it is the likeliest) of each request's continuation."""
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        self.asked |= dict.fromkeys(pairs)
        if len(self.asked) > MOST_REQUESTS:
            raise TaskError(f"asks more than {MOST_REQUESTS:,} questions; set spec.evaluate.limit")
        return [self._answers[pair] if self.knows else (-1.0, False) for pair in pairs]

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Refuse: see :func:`_check_type`."""
        raise NotImplementedError(f"{len(requests)} documents")

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """Refuse: see :func:`_check_type`."""
        raise NotImplementedError(f"{len(requests)} answers to write")


def _evaluate(task: OrderedTask, model: RecordingModel, limit: int | None, documents: Path) -> TaskOutcome:
    with _rows_at(documents, are_there=model.knows):
        loaded = _load(task)
    if task.few_shot is not None:
        loaded.set_config(key="num_fewshot", value=task.few_shot)
    loaded.set_fewshot_seed(seed=FEW_SHOT_SEED)
    found = evaluate(
        lm=model,
        task_dict={"tasks": {task.name: loaded}},
        limit=limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        log_samples=False,
    )
    values = found["results"][task.name]
    keys = [key for key in values if "," in key and "_stderr," not in key]
    key = next((key for key in keys if task.metric in (None, key.partition(",")[0])), None)
    if key is None:
        names = ", ".join(dict.fromkeys(key.partition(",")[0] for key in keys))
        raise TaskError(f"has no metric {task.metric}; it has {names}")
    metric, _, chosen = key.partition(",")
    error = values.get(f"{metric}_stderr,{chosen}")
    return TaskOutcome(
        name=task.name,
        metric=metric,
        value=float(values[key]),
        standard_error=float(error) if isinstance(error, (int, float)) else None,
        higher_is_better=bool(found["higher_is_better"][task.name].get(metric, True)),
        examples=int(found["n-samples"][task.name]["effective"]),
    )


def _load(task: OrderedTask) -> Any:
    manager = TaskManager(include_defaults=task.definition is None)
    if task.definition is None:
        entry = manager.task_index.get(task.name)
        if entry is None:
            raise TaskError("is no task of lm-evaluation-harness, and spec.evaluate.folder defines none of this name")
        _check_type((entry.cfg or {}).get("output_type", ANSWER_TYPES[0]))
    loaded = manager.load([task.definition or task.name])
    if loaded.get("groups") or set(loaded["tasks"]) != {task.name}:
        names = sorted(loaded["tasks"])
        raise TaskError(f"is a group of {len(names)} tasks; name those you want: {', '.join(names[:20])}")
    found = loaded["tasks"][task.name]
    if type(found) is not ConfigurableTask:
        raise TaskError("is a task written in Python, which is not done here")
    _check_type(found.OUTPUT_TYPE)
    return found


def _check_type(answers: str) -> None:
    """Refuse a task whose answers are written, or are whole documents."""
    if answers not in ANSWER_TYPES:
        raise TaskError(f"has answers of the type {answers}; {' and '.join(ANSWER_TYPES)} are done here")


@contextmanager
def _rows_at(folder: Path, *, are_there: bool) -> Iterator[None]:
    """Have a task take its rows from ``folder``; where they are not there yet, leave them there."""
    original = ConfigurableTask.download

    def keep(task: Any, *arguments: Any, **options: Any) -> None:
        original(task, *arguments, **options)
        config = task.config
        wanted = {config.training_split, config.validation_split, config.test_split, config.fewshot_split}
        splits = sorted(split for split in wanted if split is not None and split in task.dataset)
        folder.mkdir(parents=True, exist_ok=True)
        for number, split in enumerate(splits):
            task.dataset[split].to_parquet(folder / f"split{number}.parquet")
        (folder / SPLITS_FILE).write_text(json.dumps(splits))
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > MOST_DOCUMENT_BYTES:
            raise TaskError(f"has {size >> 20} MiB of rows; at most {MOST_DOCUMENT_BYTES >> 20} are kept")

    def take(task: Any, *_: Any, **__: Any) -> None:
        splits = json.loads((folder / SPLITS_FILE).read_bytes())
        files = {split: folder / f"split{number}.parquet" for number, split in enumerate(splits)}
        task.dataset = DatasetDict({split: Dataset.from_parquet(str(file)) for split, file in files.items()})

    ConfigurableTask.download = take if are_there else keep
    try:
        yield
    finally:
        ConfigurableTask.download = original


def main() -> int:
    """Run as a program."""
    logging.basicConfig(level=logging.WARNING)
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = Path(sys.argv[1])
    (folder / RESULT_FILE).write_text(run(folder).model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
