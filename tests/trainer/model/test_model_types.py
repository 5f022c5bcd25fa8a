"""A cross-section of ``make models``: toys of model types, from the plan to the merged model."""

from __future__ import annotations

import json
import os

import pytest

from models.one_type import REFUSED, SUCCEEDED, run_type
from models.tiny_base import write_rows, write_tokenizer
from testing.forks import fork_context
from testing.timeouts import PATIENCE_SECONDS

TYPES = {
    "bloom": "positions by ALiBi, and none of the usual keys in its configuration",
    "deepseek_v32": "latent attention, experts, and an indexer that no gradient reaches",
    "falcon": "linear layers of a class of its own",
    "gemma3n_text": "layers in lists, and weights that the model itself changes",
    "gpt2": "layers whose weights are stored the other way round",
    "mamba": "a recurrent state, and weights that kernels read",
    "nemotron_h_omni": "Mamba, attention, experts, towers, and an output head that the class itself does not name",
    "bert": "an encoder",
}
"""Model types, and what is special about them."""
REFUSED_TYPES = {
    "bert": (
        REFUSED,
        (
            "spec.model.source: is an encoder, whose tokens see the ones that follow "
            '(is_decoder is false in its config.json): no causal language model, although "bert" can be one'
        ),
    ),
}
"""Outcome and sentence of the types that do not succeed."""


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """Return a folder with a tokenizer and rows."""
    folder = tmp_path_factory.mktemp("beside")
    write_tokenizer(folder / "tokenizer")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.mark.parametrize("name", TYPES)
def test_a_type_succeeds_or_is_refused_in_prepare(name, beside, tmp_path):
    out = tmp_path / "result"
    process = fork_context().Process(
        target=run_type, args=(name, str(beside / "tokenizer"), str(beside / "rows.jsonl"), str(out))
    )
    process.start()
    process.join(PATIENCE_SECONDS)
    process.kill()
    assert process.exitcode == os.EX_OK, out.with_suffix(".log").read_text()[-3000:]
    result = json.loads(out.read_text())
    assert (result["outcome"], result["sentence"]) == REFUSED_TYPES.get(name, (SUCCEEDED, ""))
    assert result["measured"]["plan"] == ""
