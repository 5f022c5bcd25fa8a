"""Answers of base and adapter to the job's own prompts, in the history that is published with the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_api.contract import ExitCode
from qlora_trainer.training.sample_answers import NEW_TOKENS, continue_rows

PROMPTS = ["def read(self):\n", "def write(self, data):\n"]
PLAIN = {"quantization": {"type": "None", "computeType": "Float32"}}


def answers_of(ended):
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    history = Path(ended.message.adapter.uri) / "training_history.jsonl"
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    return {line["answers"]: line["texts"] for line in lines if "answers" in line}


def said(model, tokenizer, prompt):
    """Return the answer of transformers' own greedy generation, with its cache of keys and values."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.ranks
def test_answers_are_those_of_the_base_and_of_the_published_adapter(runner):
    training = {"evaluation": {"prompts": PROMPTS, "everySteps": 5}, "learningRate": "5e-2", "schedule": "Constant"}
    ended = runner.run(runner.config(ranks=2, training=training, **PLAIN))
    told = answers_of(ended)
    tokenizer = AutoTokenizer.from_pretrained(runner.model)
    base = AutoModelForCausalLM.from_pretrained(runner.model, dtype=torch.float32).eval()
    assert told["base"] == {prompt: said(base, tokenizer, prompt) for prompt in PROMPTS}
    adapted = PeftModel.from_pretrained(base, ended.message.adapter.uri).eval()
    assert told["adapter"] == {prompt: said(adapted, tokenizer, prompt) for prompt in PROMPTS}
    assert told["adapter"] != told["base"]


@pytest.mark.ranks
def test_a_model_that_no_rank_has_alone_answers_too_and_a_resumed_run_keeps_what_the_base_said(runner):
    changes = {
        "training": {"evaluation": {"prompts": PROMPTS}},
        "parallelism": {"zeroStage": 3},
        "checkpoint": {"everySteps": 2},
    }
    runner.prepare(runner.config(**changes))
    runner.kill_at(runner.config(**changes), step=5)
    told = answers_of(runner.train(runner.config(attempt=2, **changes)))
    assert [*told["base"]] == [*told["adapter"]] == PROMPTS
    assert told["adapter"] != told["base"]


class Broken(torch.nn.Module):
    def forward(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_answers_that_fail_cost_no_more_than_the_answers(caplog):
    spec = SimpleNamespace(parallelism=SimpleNamespace(zero_stage=0), dataset=SimpleNamespace(max_length=64))
    ranks = SimpleNamespace(is_first=True, device="cpu", sum=lambda *values: values)
    alone = SimpleNamespace(
        config=SimpleNamespace(spec=spec),
        ranks=ranks,
        recorder=SimpleNamespace(count=lambda items, *_: items),
        engine=Broken(),
        stop=SimpleNamespace(is_set=False),
    )
    assert continue_rows(alone, [[1, 2]], {0}) is None
    assert "prompts are left unanswered: CUDA out of memory" in caplog.text


def test_a_prompt_without_room_for_an_answer_is_refused_before_a_gpu_is_held(runner):
    config = runner.config(training={"evaluation": {"prompts": ["def f(x): return x\n" * 50]}})
    code = runner.prepare(config)
    assert code == ExitCode.USER_ERROR
    assert "spec.training.evaluation.prompts" in runner.ended(config, code).text
    assert "fewer than dataset.maxLength, 128" in runner.ended(config, code).text
