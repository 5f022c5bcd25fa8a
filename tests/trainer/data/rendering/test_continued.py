"""A prompt that ends with a message of the assistant is continued by the completion."""

from __future__ import annotations

import json
from itertools import groupby

import pytest

from qlora_trainer.data.formats import Encoder
from qlora_trainer.errors import UserError
from qlora_trainer.prepare.tokenize_rows import prepare_data

USER = {"role": "user", "content": "Q"}
CALL = {"type": "function", "function": {"name": "w", "arguments": {"x": "Bern"}}}
BEGUN = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(text, **keys):
    return {"role": "assistant", "content": text, **keys}


@pytest.fixture
def learned(chat_tokenizer, dataset):
    """Encode an exchange: the text of its one example, what counts of it between ⟦ and ⟧."""

    def encode(prompt, completion, template=PLAIN, **settings):
        settings = {"format": "PromptCompletion", "chat_template": template, **settings}
        row = Encoder(chat_tokenizer, dataset(**settings)).encode_batch(
            [{"prompt": [USER, *prompt], "completion": completion}]
        )[0]
        [example] = row.examples
        pairs = zip(example.input_ids, example.targets, strict=True)
        runs = [
            (counts, chat_tokenizer.decode([i for i, _ in run])) for counts, run in groupby(pairs, lambda pair: pair[1])
        ]
        return "".join(text.join("⟦⟧") if counts else text for counts, text in runs)

    return encode


@pytest.mark.parametrize(
    ("prompt", "completion", "template", "wanted"),
    [
        pytest.param([said("It is")], [said(" 7.")], PLAIN, "It is⟦ 7.<|im_end|>⟧\n", id="a-text"),
        pytest.param(
            [said("7 7", reasoning_content="R")], [said(" 7 7")], PLAIN, "7 7⟦ 7 7<|im_end|>⟧\n", id="that-repeats"
        ),
        pytest.param(
            [said("  It is")],
            [said(" 7.  ")],
            PLAIN.replace("m.content", "m.content | trim"),
            "It is⟦ 7.<|im_end|>⟧\n",
            id="that-is-trimmed",
        ),
        pytest.param(
            [said("Look:")],
            [said("", tool_calls=[CALL])],
            PLAIN,
            'Look:⟦{"name": "w", "arguments": {"x": "Bern"}}<|im_end|>⟧\n',
            id="with-a-tool-call",
        ),
        pytest.param(
            [said("It is")],
            [said(" 7."), USER, said("8.")],
            PLAIN,
            f"It is⟦ 7.<|im_end|>⟧\n{BEGUN}⟦8.<|im_end|>⟧\n",
            id="and-further-turns",
        ),
        pytest.param(
            [said("It is")],
            [said(" 7.")],
            PLAIN.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif").replace(
                "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
            ),
            "<think>\n\n</think>\n\nIt is⟦ 7.<|im_end|>⟧\n",
            id="after-an-empty-thought",
        ),
    ],
)
def test_the_beginning_of_an_answer_is_context(prompt, completion, template, wanted, learned):
    assert learned(prompt, completion, template) == BEGUN + wanted


def test_an_answer_that_begins_in_the_prompt_is_one_turn_where_all_is_learned(learned):
    assert learned([said("It is")], [said(" 7.")], loss_on="All") == f"⟦{BEGUN}It is 7.<|im_end|>\n⟧"
    with pytest.raises(UserError, match="one message 2 to write of which a part has weight 0: with lossOn All, give"):
        learned([said("It is", weight=0)], [said(" 7.")], loss_on="All")
    assert learned([said("It is", weight=0)], [said(" 7.")]) == f"{BEGUN}It is⟦ 7.<|im_end|>⟧\n"


@pytest.mark.parametrize(
    ("prompt", "completion", "wanted"),
    [
        ([said("It is")], [USER, said("7.")], f"It is<|im_end|>\n{BEGUN}⟦7.<|im_end|>⟧\n"),
        (
            [said("It is")],
            [said("7.", reasoning_content="R")],
            "It is<|im_end|>\n<|im_start|>assistant\n⟦7.<|im_end|>⟧\n",
        ),
    ],
    ids=["a-message-of-the-user-follows", "the-completion-reasons-first"],
)
def test_a_message_that_the_completion_cannot_continue_is_closed(prompt, completion, wanted, learned):
    assert learned(prompt, completion) == BEGUN + wanted


def test_a_template_that_changes_the_text_of_such_an_answer_is_refused(learned):
    with pytest.raises(UserError, match="given row 1, changes the text of message 2, which begins in the prompt"):
        learned([said("It is")], [said(" 7.")], PLAIN.replace("m.content", "m.content | replace('s 7', 's  7')"))


def test_what_becomes_of_such_rows_is_told(chat_tokenizer, job, tmp_path):
    rows = [
        {"prompt": [USER], "completion": [said("7.")]},
        {"prompt": [USER, said("It is")], "completion": [said(" 7.")]},
        {"prompt": [USER, said("It is")], "completion": [said("7.", reasoning_content="R")]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = job(
        format="PromptCompletion", chat_template=PLAIN.replace("{{ m.content", "{{ m.reasoning_content }}{{ m.content")
    )
    notes = prepare_data(spec, chat_tokenizer, "t1", path, None, tmp_path / "cache").receipt.notes
    continued, closed = sorted(note for note in notes if "prompt" in note)
    assert continued == (
        "completions go on with the message of the assistant that ends the prompt: its text is context (rows with them:"
        " 1, the first is row 2 (rows.jsonl, line 2))"
    )
    assert closed == (
        "messages of the assistant that end a prompt are closed, and the completion begins another one: they are the"
        " only message, or call tools, or the completion begins with reasoning (rows with them: 1, the first is row 3"
        " (rows.jsonl, line 3))"
    )
