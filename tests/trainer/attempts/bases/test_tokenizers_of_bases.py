"""Bases that name code of their own, and tokenizers with more tokens than their base has embeddings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora_api.contract import ExitCode

pytestmark = pytest.mark.ranks

CODE = "raise SystemExit('the code of a base was run')\n"
REFERENCES = {"config.json": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
TOKENIZER = {"AutoTokenizer": [None, "code.PreTrainedTokenizerFast"]}


def names_code(runner, references):
    """A copy of the base with code of its own, which ends the process that runs it."""
    folder = shutil.copytree(runner.model, runner.folder / "model")
    (folder / "code.py").write_text(CODE)
    for name, value in references.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": value}))
    return {"source": str(folder)}


def test_a_base_whose_classes_transformers_has_is_trained_without_its_code(runner):
    base = names_code(runner, {**REFERENCES, "tokenizer_config.json": TOKENIZER})
    output = {"destination": str(runner.folder / "out"), "merge": "BFloat16", "allowWorseEval": True}
    training = {"epochs": None, "maxSteps": 1}
    ended = runner.run(runner.config(ranks=1, model=base, training=training, output=output))
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    published = Path(ended.message.adapter.uri).parent
    files = list(published.rglob("*.json"))
    assert {file.name for file in files} >= {"config.json", "tokenizer_config.json"}
    assert not [file for file in files if '"auto_map"' in file.read_text()]
    assert not list(published.rglob("*.py"))


def test_a_tokenizer_that_needs_its_code_ends_prepare(runner):
    base = names_code(runner, {"tokenizer_config.json": {"AutoTokenizer": ["code.OwnTokenizer", None]}})
    config = runner.config(ranks=1, model=base)
    code = runner.prepare(config)
    assert code == ExitCode.USER_ERROR
    said = runner.ended(config, code).text
    assert said.startswith("spec.model.source: has a tokenizer with its own code (auto_map in tokenizer_config.json")
    assert "code.OwnTokenizer" in said


def larger_tokenizer(runner):
    """A copy of the base whose tokenizer has a token more than there are embeddings."""
    folder = shutil.copytree(runner.model, runner.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return {"source": str(folder)}


def test_a_token_without_an_embedding_ends_prepare_where_rows_or_prompts_hold_it(runner):
    model = larger_tokenizer(runner)
    rows = runner.folder / "extra.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b <|extra|>"}\n' * 8)
    cases = (
        ({"dataset": {"train": {"source": str(rows)}}}, ["spec.model.source: ", "512 embeddings", "513 tokens"]),
        (
            {"training": {"evaluation": {"prompts": ["a", "say <|extra|>"]}}},
            ['spec.training.evaluation.prompts: "say <|extra|>" holds', "512 embeddings"],
        ),
    )
    for attempt, (changes, parts) in enumerate(cases, start=1):
        config = runner.config(attempt, ranks=1, model=model, **changes)
        code = runner.prepare(config)
        assert code == ExitCode.USER_ERROR
        said = runner.ended(config, code).text
        assert all(part in said for part in [*parts, "'<|extra|>', number 512"]), said
    assert runner.prepare(runner.config(3, ranks=1, model=model)) == 0, "a token that nothing holds does no harm"
