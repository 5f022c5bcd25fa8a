"""Tasks of spec.evaluate: the harness's own model gives the same, limits hold, and a resumed run keeps the base's."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from forked_rank import STOP_BEFORE_ADAPTER_TASKS
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_api.contract import ExitCode
from qlora_trainer.publish.adapter_manifest import Manifest

PLAIN = {"quantization": {"type": "None", "computeType": "Float32"}}
DEFINITIONS = {
    "docstrings": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{[first, second]}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    },
    "next_words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{[first, second][label]}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
}


@pytest.fixture
def definitions(runner, tmp_path):
    """Return a folder with two tasks over the runner's own rows, the right completion beside another row's."""
    rows = [json.loads(line) for line in Path(runner.rows).read_text().splitlines()][:24]
    folder = tmp_path / "tasks"
    folder.mkdir()
    asked = []
    for number, row in enumerate(rows):
        pair = [row["completion"], rows[(number + 7) % len(rows)]["completion"]]
        label = number % 2
        asked.append({"prompt": row["prompt"], "first": pair[label], "second": pair[1 - label], "label": label})
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for name, settings in DEFINITIONS.items():
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": "asked.jsonl"}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **settings}))
    return folder


def evaluate(folder, *tasks):
    return {"folder": str(folder), "tasks": [task if isinstance(task, dict) else {"name": task} for task in tasks]}


def reached(model, tokenizer, folder):
    """Return what lm-evaluation-harness measures with its own model class."""
    tasks = []
    for name in DEFINITIONS:
        settings = json.loads((folder / f"{name}.yaml").read_text())
        settings["dataset_kwargs"] = {"data_files": {"test": str(folder / "asked.jsonl")}}
        tasks.append(settings)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=128, batch_size=1)
    found = simple_evaluate(harness, tasks=tasks, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)
    return {
        name: {key.partition(",")[0]: value for key, value in values.items()}
        for name, values in found["results"].items()
    }


@pytest.mark.ranks
def test_results_are_those_of_the_harness_with_the_base_and_with_the_published_adapter(runner, definitions):
    tasks = [{"name": "docstrings", "metric": "acc_norm"}, {"name": "next_words"}]
    ended = runner.run(runner.config(ranks=2, evaluate=evaluate(definitions, *tasks), **PLAIN))
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(runner.model)
    base = AutoModelForCausalLM.from_pretrained(runner.model, dtype=torch.float32).eval()
    before = reached(base, tokenizer, definitions)
    after = reached(PeftModel.from_pretrained(base, ended.message.adapter.uri).eval(), tokenizer, definitions)
    found = {task.name: task for task in ended.message.tasks}
    for name, metric in (("docstrings", "acc_norm"), ("next_words", "perplexity")):
        assert found[name].metric == metric
        assert found[name].examples == 24
        assert float(found[name].base) == pytest.approx(before[name][metric], rel=1e-3)
        assert float(found[name].adapter) == pytest.approx(after[name][metric], rel=1e-3)
    assert float(found["next_words"].adapter) < float(found["next_words"].base)
    adapter = Path(ended.message.adapter.uri)
    assert "| docstrings (acc_norm) | " in (adapter / "README.md").read_text()
    metrics = Manifest.model_validate_json(Path(ended.message.adapter.manifest_uri).read_bytes()).metrics
    assert metrics["adapter:next_words:perplexity"] == float(found["next_words"].adapter)
    lines = [json.loads(line) for line in (adapter / "training_history.jsonl").read_text().splitlines()]
    assert [line["tasks"][0]["name"] for line in lines if "tasks" in line] == ["docstrings"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"name": "docstrings", "minimum": "1"}, "below the minimum, 1"),
        ({"name": "next_words", "maximum": "1.5"}, "above the maximum, 1.5"),
    ],
)
def test_an_adapter_that_does_not_reach_a_limit_is_not_published(runner, definitions, limit, words):
    ended = runner.run(
        runner.config(ranks=1, training={"epochs": None, "maxSteps": 2}, evaluate=evaluate(definitions, limit), **PLAIN)
    )
    assert ended.code == ExitCode.ADAPTER_REJECTED
    assert words in ended.text
    assert not list(Path(runner.folder / "out").rglob("manifest.json"))


@pytest.mark.ranks
def test_a_resumed_run_keeps_what_the_base_reached(runner, definitions):
    changes = {"evaluate": evaluate(definitions, "docstrings"), "parallelism": {"zeroStage": 3}, **PLAIN}
    paused = runner.run(runner.config(ranks=2, pause=2, **changes))
    assert paused.code == ExitCode.PREEMPTED, paused.log[-2000:]
    ended = runner.run(runner.config(attempt=2, ranks=2, **changes))
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    assert paused.log.count("the base reaches") == 1
    assert "the base reaches" not in ended.log
    assert ended.message.tasks[0].base is not None


@pytest.mark.ranks
def test_stopping_while_the_best_adapter_is_measured_keeps_the_weights_of_the_last_step(
    runner, definitions, monkeypatch
):
    changes = {
        "evaluate": evaluate(definitions, "docstrings"),
        "training": {
            "epochs": None,
            "maxSteps": 40,
            "learningRate": "0.3",
            "evaluation": {"everySteps": 1, "patience": 2},
        },
        "output": {"allowWorseEval": True},
        **PLAIN,
    }
    monkeypatch.setenv(STOP_BEFORE_ADAPTER_TASKS, "1")
    stopped = runner.run(runner.config(ranks=1, **changes))
    assert stopped.code == ExitCode.PREEMPTED, stopped.log[-3000:]
    folders = {int(path.name.removeprefix("step-")): path for path in (runner.folder / "checkpoints").iterdir()}
    last = max(stopped.losses)
    assert max(folders) == last < 40
    adapters = {sha256(next(path.glob("*/adapter.safetensors")).read_bytes()).digest() for path in folders.values()}
    assert len(adapters) == len(folders) > 1
    monkeypatch.delenv(STOP_BEFORE_ADAPTER_TASKS)
    ended = runner.run(runner.config(attempt=2, ranks=1, **changes))
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    assert not ended.losses
    manifest = json.loads((runner.folder / "out" / "manifest.json").read_text())
    assert manifest["metrics"]["step"] < last


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"name": "no_such_task"}, '"no_such_task" is no task of lm-evaluation-harness'),
        ({"name": "docstrings", "metric": "f1"}, "has no metric f1; it has acc, acc_norm"),
        ({"name": "gsm8k"}, "has answers of the type generate_until; multiple_choice and loglikelihood are done here"),
    ],
)
def test_a_task_that_cannot_be_asked_ends_prepare(runner, definitions, task, words):
    config = runner.config(evaluate=evaluate(definitions, task), **PLAIN)
    assert runner.prepare(config) == ExitCode.USER_ERROR
    assert words in runner.ended(config, ExitCode.USER_ERROR).text
