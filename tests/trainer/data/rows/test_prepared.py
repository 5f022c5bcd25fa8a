"""Rows of several files in the set that is trained on, and errors about them."""

from __future__ import annotations

import csv
import json
import re

import pytest

from qlora_api.spec import Tolerance
from qlora_api.spec.learning import EvaluationSpec as Evaluation
from qlora_trainer.data.collect import Identities, progress_line
from qlora_trainer.errors import UserError
from qlora_trainer.prepare.tokenize_rows import prepare_data
from qlora_trainer.prepare.tolerance import check_tolerance

PAIR = {"prompt": "return", "completion": " x"}


@pytest.fixture
def prepare(tokenizer, job, tmp_path):
    def run(train, evaluation=None, **fields):
        spec = job(format="PromptCompletion", eval_source="eval" if evaluation else None, **fields)
        return prepare_data(spec, tokenizer, "t1", train, evaluation, tmp_path / "cache")

    return run


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_bad_row_in_one_of_several_files_is_named_with_file_and_line(prepare, tmp_path):
    for number in range(3):
        rows = [PAIR] * 10
        if number == 1:
            rows[5] = {**PAIR, "completion": None}
        write(tmp_path / "f" / f"p{number}.jsonl", rows)
    wanted = '"completion" must hold text in every row; row 16 (p1.jsonl, line 6) holds nothing'
    with pytest.raises(UserError, match=re.escape(wanted)):
        prepare(tmp_path / "f")


def test_a_conversation_that_the_template_refuses_is_named_with_file_and_line(chat_tokenizer, job, tmp_path):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    write(tmp_path / "f" / "a.jsonl", [{"messages": messages}] * 3)
    write(tmp_path / "f" / "b.jsonl", [{"messages": messages}, {"messages": messages[1:] + messages}])
    with pytest.raises(UserError, match=r"given row 5 \(b.jsonl, line 2\), has no text before the assistant's first"):
        prepare_data(job(format="Messages"), chat_tokenizer, "t1", tmp_path / "f", None, tmp_path / "cache")


def test_the_longest_row_of_several_files_is_named(prepare, tmp_path):
    write(tmp_path / "f" / "a.jsonl", [PAIR] * 3)
    write(tmp_path / "f" / "b.jsonl", [PAIR, {**PAIR, "completion": "return " * 99}])
    with pytest.raises(UserError, match=r"the longest is row 5 \(b.jsonl, line 2\)"):
        prepare(tmp_path / "f", max_length=32)


def test_evaluation_rows_that_share_a_prompt_are_counted_beside_those_that_are_the_same(prepare, tmp_path):
    train = [{"prompt": f"def f{i}(x):", "completion": f" return {i}"} for i in range(8)]
    evaluation = [train[0], {**train[1], "completion": " pass"}, {**train[1], "completion": " raise"}]
    evaluation.append({"prompt": "class A:", "completion": " return 1"})
    receipt = prepare(write(tmp_path / "train.jsonl", train), write(tmp_path / "eval.jsonl", evaluation)).receipt
    assert (receipt.eval_rows, receipt.eval_in_train, receipt.eval_prompts_in_train) == (4, 1, 3)


def test_rows_of_which_all_counts_have_no_prompt_to_share(prepare, tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR])
    other = write(tmp_path / "eval.jsonl", [{**PAIR, "completion": " y"}])
    assert prepare(path, other, loss_on="All").receipt.eval_prompts_in_train == 0


def test_identities_count_what_is_repeated_and_what_is_shared():
    one, other = Identities(), Identities()
    for number in range(3000):
        one.add(str(number % 2000).encode())
        other.add(str(number).encode())
    assert (one.repeated(), other.repeated()) == (1000, 0)
    assert (one.also_in(other), other.also_in(one)) == (3000, 2000)


def test_progress_says_rate_and_time_left():
    assert progress_line("/data/rows", 1_000_000, 2 * 10**9, 10**10, 100.0) == (
        "/data/rows: 1,000,000 rows, 2,000 of 10,000 MB, 20.0 MB/s, about 7 min left"
    )


def test_prompts_of_a_job_whose_rows_are_conversations_are_measured_as_turns(chat_tokenizer, job, tmp_path):
    """And by what Prepare found before, where the rows are tokenized already."""
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    path = write(tmp_path / "rows.jsonl", [{"prompt": messages[:1], "completion": messages[1:]}])
    spec = job(format="PromptCompletion", max_length=32)
    receipt = prepare_data(spec, chat_tokenizer, "t1", path, None, tmp_path / "cache").receipt
    assert receipt.conversations
    asked = "return " * 26
    training = spec.training.model_copy(update={"evaluation": Evaluation(prompts=[asked])})
    with_prompts = spec.model_copy(update={"training": training})
    for cache in ("cache", "another"):
        with pytest.raises(UserError, match=r"^spec\.training\.evaluation\.prompts: .* has 3\d tokens"):
            prepare_data(with_prompts, chat_tokenizer, "t1", path, None, tmp_path / cache)
    texts = write(tmp_path / "texts.jsonl", [PAIR])
    assert not prepare_data(with_prompts, chat_tokenizer, "t1", texts, None, tmp_path / "cache").receipt.conversations


def test_rows_with_tools_are_counted(chat_tokenizer, chatml, job, tmp_path):
    """Those whose tools the template writes; the others say what it leaves out."""
    messages = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "7."}]
    path = write(
        tmp_path / "rows.jsonl",
        [{"messages": messages, "tools": tools} for tools in ([{"name": "weather"}], [], "[]", None)],
    )
    figures = []
    for template in ("{{ tools | tojson if tools }}" + chatml, chatml):
        spec = job(format="Messages", chat_template=template)
        receipt = prepare_data(spec, chat_tokenizer, "t1", path, None, tmp_path / "cache").receipt
        figures.append((receipt.rows, receipt.rows_with_tools, receipt.left_out, len(receipt.notes)))
    assert figures == [(4, 1, 0, 0), (4, 0, 1, 1)]
    assert receipt.notes == [
        "the chat template leaves out tools of rows, or parts of them: these are counted as leftOut"
    ]
    with pytest.raises(UserError, match=r"leftOut: .*is exceeded: 1 of 4 \(25.0%\) rows say something that the chat"):
        check_tolerance(Tolerance(left_out="0.2"), receipt)


def test_rows_learn_from_the_assistant_however_its_role_is_spelled(chat_tokenizer, job, tmp_path):
    rows = [
        {"messages": [{"role": "User", "content": "Q"}, {"role": role, "content": "A"}]}
        for role in ("assistant", "Assistant", "model")
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    receipt = prepare_data(job(format="Messages"), chat_tokenizer, "t1", path, None, tmp_path / "cache").receipt
    assert (receipt.train_rows, receipt.duplicates, receipt.fully_masked) == (3, 2, 0)
    assert receipt.notes == []


@pytest.mark.parametrize(("loss_on", "template"), [(None, ""), (None, "{# 'critic' #}"), ("All", "")])
def test_rows_with_other_roles_are_counted_unless_the_template_knows_them_or_all_is_learned(
    loss_on, template, chat_tokenizer, chatml, job, tmp_path
):
    chat = [{"role": "user", "content": "Q"}, {"role": "critic", "content": "C"}, {"role": "assistant", "content": "A"}]
    path = write(tmp_path / "rows.jsonl", [{"messages": chat[::2]}, *[{"messages": chat}] * 2])
    spec = job(format="Messages", loss_on=loss_on, chat_template=chatml + template)
    notes = prepare_data(spec, chat_tokenizer, "t1", path, None, tmp_path / "cache").receipt.notes
    told = (
        "messages of a role other than assistant, developer, system, tool and user, which the chat template does not"
        " name, are context and not learned (rows with them: 2, the first is row 2 (rows.jsonl, line 2))"
    )
    assert notes == ([] if loss_on or template else [told])


@pytest.mark.parametrize("loss_on", [None, "All"])
def test_what_a_template_leaves_out_exceeds_the_tolerance_whatever_is_learned(loss_on, chat_tokenizer, job, tmp_path):
    call = {"type": "function", "function": {"name": "w", "arguments": {"city": "Bern"}}}
    said = {"role": "assistant", "content": "Wait.", "tool_calls": [call]}
    path = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "Q"}, said]}] * 3)
    spec = job(format="Messages", loss_on=loss_on, tolerance=Tolerance(left_out="0.5"))
    receipt = prepare_data(spec, chat_tokenizer, "t1", path, None, tmp_path / "cache").receipt
    assert (receipt.left_out, receipt.empty_turns) == (3, 0)
    with pytest.raises(UserError, match=r"^spec\.dataset\.tolerance\.leftOut: .* is exceeded: 3 of 3"):
        check_tolerance(spec.dataset.tolerance, receipt)


ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
ANSWERED = [{"role": "assistant", "content": "A"}]


def test_conversations_as_json_text_in_a_csv_file_are_those_of_lists(chat_tokenizer, job, tmp_path):
    def prepared(path):
        return prepare_data(
            job(format="PromptCompletion"), chat_tokenizer, "t1", path, None, tmp_path / "cache"
        ).receipt

    cells = tmp_path / "rows.csv"
    with cells.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("prompt", "completion", "tools"), *[(json.dumps(ASKED), json.dumps(ANSWERED), "")] * 2]
        )
    lists = write(tmp_path / "rows.jsonl", [{"prompt": ASKED, "completion": ANSWERED}] * 2)
    wanted, found = prepared(lists), prepared(cells)
    assert found.model_copy(update={"data_hash": wanted.data_hash}) == wanted
    assert found.conversations
    assert "⟦A<|im_end|>⟧" in found.samples[0]


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("first", "this", "before"), [(PAIR, "messages", "text"), (None, "text", "messages")], ids=["text", "messages"]
)
def test_texts_and_conversations_are_not_mixed(first, this, before, as_text, chat_tokenizer, job, tmp_path):
    exchange = {"prompt": ASKED, "completion": ANSWERED}
    if as_text:
        exchange = {name: json.dumps(cell) for name, cell in exchange.items()}
    rows = [PAIR, PAIR, exchange] if first else [exchange, exchange, PAIR]
    path = write(tmp_path / "rows.jsonl", rows)
    wanted = (
        'spec.dataset.columns.prompt: "prompt" and completion must hold texts in all rows, or lists of messages in all;'
        f" row 3 (rows.jsonl, line 3) holds {this}, where the first row holds {before}"
    )
    with pytest.raises(UserError, match=re.escape(wanted)):
        prepare_data(job(format="PromptCompletion"), chat_tokenizer, "t1", path, None, tmp_path / "cache")
    other = write(tmp_path / "eval.jsonl", rows[2:])
    path = write(tmp_path / "rows.jsonl", rows[:2])
    with pytest.raises(
        UserError, match=rf"row 1 \(eval.jsonl, line 1\) holds {this}, where the first row holds {before}"
    ):
        prepare_data(
            job(format="PromptCompletion", eval_source="eval"), chat_tokenizer, "t1", path, other, tmp_path / "cache"
        )


def test_a_prompt_of_messages_as_json_text_with_a_text_as_completion_is_told(prepare, tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR, {**PAIR, "prompt": json.dumps(ASKED)}, {**PAIR, "prompt": "[1]"}])
    receipt = prepare(path).receipt
    assert (receipt.train_rows, receipt.conversations) == (3, False)
    [note] = receipt.notes
    assert note == (
        "messages as JSON text in only one of prompt and completion are given to the model as the text that they are"
        " (rows with them: 1, the first is row 2 (rows.jsonl, line 2))"
    )
