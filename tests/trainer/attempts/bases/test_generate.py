"""Base, adapter and merged model answer the same prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from composites import COMPOSITES
from qlora_api.contract import ExitCode
from qlora_trainer import generate
from quantized_bases import quantized_base


@pytest.mark.ranks
def test_base_adapter_and_merged_model_answer_side_by_side(runner, monkeypatch, capsys):
    changes = {"output": {"merge": "BFloat16"}, "training": {"learningRate": "2e-2"}}
    ended = runner.run(runner.config(ranks=1, **changes))
    assert ended.code == ExitCode.DONE, ended.log[-2000:]
    adapter = Path(ended.message.adapter.uri)
    arguments = ["--base", str(runner.model), "--adapter", str(adapter), "--merged", str(adapter.parent / "merged")]
    arguments += ["--dataset", json.dumps(runner.spec()["dataset"])]
    prompts = ["def read(self):\n", "def write(self, data):\n"]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    monkeypatch.setattr(sys, "argv", ["generate", *arguments, *asked, "--max-new-tokens", "8", "--json"])
    assert generate.main() == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert all(row["adapter"] != row["base"] for row in rows)
    assert all(row["merged"] for row in rows)


def test_a_base_that_cannot_be_read_is_a_users_error(runner, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", "--base", str(runner.folder / "none"), "--prompt", "x"])
    assert generate.main() == ExitCode.USER_ERROR
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_base_with_towers_is_asked_without_them(name, composites):
    check_answer(composites[name])


@pytest.mark.parametrize("kind", ["gpt_oss", "llama", "mistral3"])
def test_a_base_in_mxfp4_or_fp8_is_asked_in_16_bits(kind, tmp_path):
    check_answer(quantized_base(tmp_path, kind))


def check_answer(folder):
    """Compare tokens made with a cache with the likeliest ones of whole forward passes."""
    model = generate.load(folder)
    assert model.dtype in (torch.bfloat16, torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9]], device=model.device)
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    with torch.no_grad():
        for _ in range(3):
            likeliest = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, likeliest], dim=1)
    assert found.tolist() == ids.tolist()
