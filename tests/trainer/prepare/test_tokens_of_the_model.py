"""Tokens that a model has no embedding for, as with the tokenizer of another model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qlora_trainer.data.tokenized_rows import TokenizedRows
from qlora_trainer.errors import UserError
from qlora_trainer.prepare.fetch_and_tokenize import check_tokens


def rows(*tokens: int) -> TokenizedRows:
    return TokenizedRows.of([(tokens, [True] * len(tokens))])


@pytest.fixture
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, "a")))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_token_past_the_embeddings_ends_prepare_with_the_token_and_the_sizes(split, tokenizer):
    data = SimpleNamespace(**{"train": rows(0, 1), "eval": None, split: rows(0, 2, 1)})
    with pytest.raises(UserError) as caught:
        check_tokens(data, tokenizer, 2)
    assert str(caught.value).startswith(
        "spec.model.source: has 2 embeddings and a tokenizer of 3 tokens: the rows hold the token 'c', number 2"
    )


def test_more_embeddings_than_tokens_are_fine(tokenizer):
    check_tokens(SimpleNamespace(train=rows(0, 2), eval=None), tokenizer, 3)
