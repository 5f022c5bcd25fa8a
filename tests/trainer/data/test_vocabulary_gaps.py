"""Characters for which a tokenizer has no tokens are not learned, and are counted."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_trainer.errors import UserError
from qlora_trainer.prepare.tokenize_rows import prepare_data

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
CORPUS = ["What is the capital of Bern and Basel It is a town"] * 4


def trained(model, trainer, **special) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if isinstance(model, models.WordLevel):
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=SPECIAL, **special
    )


@pytest.fixture(params=["characters-are-dropped", "unknown-token", "words"])
def poor(request) -> PreTrainedTokenizerFast:
    """A tokenizer without bytes among its tokens."""
    if request.param == "characters-are-dropped":
        return trained(models.BPE(), trainers.BpeTrainer(special_tokens=SPECIAL, show_progress=False))
    unk = {"special_tokens": ["<unk>", *SPECIAL], "show_progress": False}
    if request.param == "words":
        return trained(models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(**unk), unk_token="<unk>")
    trainer = trainers.UnigramTrainer(unk_token="<unk>", vocab_size=60, **unk)
    return trained(models.Unigram(), trainer, unk_token="<unk>")


@pytest.fixture
def prepared(poor, job, tmp_path):
    def prepare(rows, **fields):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return prepare_data(job(**fields), poor, "t1", path, None, tmp_path / "cache")

    return prepare


def chat(*answers):
    turns = [({"role": "user", "content": "What is"}, {"role": "assistant", "content": answer}) for answer in answers]
    return {"messages": [message for pair in turns for message in pair]}


def learned(prepared, number, tokenizer) -> str:
    tokens, targets = prepared.train.row(number)
    return tokenizer.decode([token for token, counts in zip(tokens.tolist(), targets.tolist(), strict=True) if counts])


def note(rows):
    return (
        "characters for which the tokenizer has no token are neither read nor learned (counted as leftOut) (rows with"
        f" them: {rows}, the first is row 2 (rows.jsonl, line 2))"
    )


def test_answers_that_the_tokenizer_cannot_write_are_counted_and_not_learned(prepared, poor):
    rows = [chat("It is Bern"), chat("首都"), chat("首都", "a town"), chat("a town 首都")]
    data = prepared(rows, format="Messages", chat_template=TEMPLATE)
    receipt = data.receipt
    assert (receipt.rows, receipt.train_rows, receipt.fully_masked) == (4, 3, 1)
    assert (receipt.left_out, receipt.empty_turns) == (3, 2)
    assert receipt.notes == [note(3)]
    texts = [learned(data, number, poor).replace(" ", "") for number in range(3)]
    assert texts == ["ItisBern<|end|>", "atown<|end|>", "atown<|end|>"]


def test_a_question_that_the_tokenizer_cannot_write_is_counted(prepared):
    row = {"messages": [{"role": "user", "content": "首都 ?"}, {"role": "assistant", "content": "It is Bern"}]}
    receipt = prepared([chat("It is Bern"), row], format="Messages", chat_template=TEMPLATE).receipt
    assert (receipt.train_rows, receipt.left_out, receipt.empty_turns) == (2, 1, 0)
    assert receipt.notes == [note(1)]


def test_completions_and_texts_are_counted_too(prepared, poor):
    pairs = [{"prompt": "What is", "completion": answer} for answer in ("It is Bern", "首都", "a town 首都")]
    data = prepared(pairs, format="PromptCompletion")
    receipt = data.receipt
    assert (receipt.train_rows, receipt.fully_masked, receipt.left_out, receipt.empty_turns) == (2, 1, 2, 1)
    assert [learned(data, n, poor).replace(" ", "") for n in range(2)] == ["ItisBern<|end|>", "atown<|end|>"]
    receipt = prepared([{"text": "It is Bern"}, {"text": "首都"}], format="Text").receipt
    assert (receipt.train_rows, receipt.fully_masked, receipt.left_out) == (1, 1, 1)


def test_rows_of_which_nothing_can_be_written_are_refused(prepared):
    with pytest.raises(UserError, match="none of the training rows has a token that counts"):
        prepared([chat("首都")], format="Messages", chat_template=TEMPLATE)


def test_a_tokenizer_with_bytes_writes_everything(chat_tokenizer, job, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat("首都 🜨 \u0301")))
    receipt = prepare_data(job(format="Messages"), chat_tokenizer, "t1", path, None, tmp_path / "cache").receipt
    assert (receipt.left_out, receipt.notes) == (0, [])
