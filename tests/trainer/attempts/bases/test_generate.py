"""Base, adapter and merged model answer the same prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer import generate


@pytest.mark.ranks
def test_base_adapter_and_merged_model_answer_side_by_side(workshop, monkeypatch, capsys):
    changes = {"output": {"merge": "BFloat16"}, "training": {"learningRate": "2e-2"}}
    ended = workshop.run(workshop.config(ranks=1, **changes))
    assert ended.code == ExitCode.DONE, ended.log[-2000:]
    adapter = Path(ended.message.adapter.uri)
    arguments = ["--base", str(workshop.model), "--adapter", str(adapter), "--merged", str(adapter.parent / "merged")]
    arguments += ["--dataset", json.dumps(workshop.spec()["dataset"])]
    prompts = ["def read(self):\n", "def write(self, data):\n"]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    monkeypatch.setattr(sys, "argv", ["generate", *arguments, *asked, "--max-new-tokens", "8", "--json"])
    assert generate.main() == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert all(row["adapter"] != row["base"] for row in rows)
    assert all(row["merged"] for row in rows)


def test_a_base_that_cannot_be_read_is_a_users_error(workshop, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", "--base", str(workshop.folder / "none"), "--prompt", "x"])
    assert generate.main() == ExitCode.USER_ERROR
    assert "none" in capsys.readouterr().err
