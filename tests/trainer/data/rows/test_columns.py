"""Columns beside the conversation: what is read of them, and what is told of those that are not."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from qlora_api.spec import Columns
from qlora_trainer.errors import UserError
from qlora_trainer.prepare.tokenize_rows import prepare_data

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
TURNS = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"


@pytest.fixture
def prepare(chat_tokenizer, job, jsonl, tmp_path):
    def run(rows, **fields):
        path = rows if not isinstance(rows, list) else jsonl(rows)
        spec = job(**{"format": "Messages", **fields})
        return prepare_data(spec, chat_tokenizer, "t1", path, None, tmp_path / "cache").receipt

    return run


def parquet(path, rows):
    pa_parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        pytest.param({"messages": CHAT, "system": "Be brief."}, {}, id="messages"),
        pytest.param(
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "Be brief."},
            {"columns": Columns(messages="conversations")},
            id="sharegpt",
        ),
        pytest.param(
            {"messages": CHAT, "rules": "Be brief."}, {"columns": Columns(system="rules")}, id="of-another-name"
        ),
        pytest.param(
            {"prompt": CHAT[:1], "completion": CHAT[1:], "system": "Be brief."},
            {"format": "PromptCompletion"},
            id="prompt-and-completion",
        ),
    ],
)
@pytest.mark.parametrize("as_parquet", [False, True])
def test_a_system_column_is_the_system_message(row, fields, as_parquet, prepare, tmp_path):
    receipt = prepare(parquet(tmp_path / "rows.parquet", [row] * 2) if as_parquet else [row] * 2, **fields)
    assert receipt.samples[0] == SYSTEM + TURNS
    column = "rules" if fields.get("columns", Columns()).system == "rules" else "system"
    where = "row 1" if as_parquet else "line 1"
    file = "rows.parquet" if as_parquet else "rows.jsonl"
    assert receipt.notes[0] == (
        f"texts in the column {column} are given as the system message"
        f" (rows with them: 2, the first is row 1 ({file}, {where}))"
    )


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize(
    ("cell", "unused"),
    [(None, 0), ("", 0), (" ", 0), ("Be brief.", 0), ("Be long.", 1), ({"os": "linux"}, 1), (7, 1)],
    ids=str,
)
def test_a_system_message_of_the_conversation_wins_and_another_is_counted(role, cell, unused, prepare):
    messages = [{"role": role, "content": "Be brief."}, *CHAT]
    receipt = prepare([{"messages": messages, "system": cell}])
    assert receipt.samples[0] == SYSTEM.replace("system", role) + TURNS
    assert [note.partition(":")[0] for note in receipt.notes] == ["cells of the column system are not used"] * unused


@pytest.mark.parametrize("as_text", [False, True])
def test_functions_are_tools(as_text, prepare, chatml):
    function = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object", "properties": {}}}
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + chatml
    functions = json.dumps([function]) if as_text else [function]
    receipt = prepare([{"messages": CHAT, "functions": functions}], chat_template=template)
    assert receipt.samples[0] == json.dumps([{"type": "function", "function": function}]) + TURNS
    assert (receipt.rows_with_tools, receipt.notes) == (1, [])


@pytest.mark.parametrize("functions", ["sort and map", {"name": "w"}, ["w"], [{"description": "D"}]])
def test_functions_that_are_none_are_told(functions, prepare):
    receipt = prepare([{"messages": CHAT, "functions": functions}])
    assert receipt.samples[0] == TURNS
    assert [note.partition(":")[0] for note in receipt.notes] == ["cells of the column functions are not used"]


def test_functions_beside_tools_are_told(prepare):
    tools = [{"type": "function", "function": {"name": "w"}}]
    receipt = prepare([{"messages": CHAT, "functions": [{"name": "v"}], "tools": tools}])
    assert any(note.startswith("cells of the column functions are not used") for note in receipt.notes)


@pytest.mark.parametrize("as_parquet", [False, True])
def test_columns_that_are_not_read_are_named(as_parquet, prepare, tmp_path):
    rows = [{"messages": CHAT, "images": ["a.png"], "id": "3", "history": "H"}] * 2
    receipt = prepare(parquet(tmp_path / "rows.parquet", rows) if as_parquet else rows)
    assert receipt.notes == ["columns that are not read: history, id, images"]


def test_texts_in_the_system_column_of_pairs_are_told(prepare):
    row = {"prompt": "return", "completion": " x", "system": "Be brief.", "history": []}
    receipt = prepare([row], format="PromptCompletion")
    assert [note.partition(":")[0] for note in receipt.notes] == [
        "cells of the column system are not used",
        "columns that are not read",
    ]
    receipt = prepare([{"instruction": "I", "output": "O", "system": "S"}], format="Instruction")
    assert receipt.notes == ["columns that are not read: system"]


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_a_placeholder_for_what_is_no_text_is_refused(kind, prepare):
    asked = [{"role": "user", "content": f"What is this? <{kind}>"}, CHAT[1]]
    assert prepare([{"messages": asked}]).notes == []
    rows = [{"messages": CHAT, f"{kind}s": []}, {"messages": asked, f"{kind}s": ["a.bin"]}]
    with pytest.raises(UserError) as caught:
        prepare(rows)
    assert str(caught.value) == (
        'spec.dataset.columns.messages: "messages" must hold text alone; row 2 (rows.jsonl, line 2) has the placeholder'
        f" <{kind}> for what is in the column {kind}s, and models are trained on text: leave such rows or that column"
        " out"
    )


@pytest.mark.parametrize("empty", [[], None, "", {}])
def test_a_row_without_images_may_speak_of_them_beside_rows_of_a_mixed_set(empty, prepare):
    asked = [{"role": "user", "content": "What does <image> do in HTML?"}, CHAT[1]]
    rows = [{"messages": asked, "images": empty}, {"messages": CHAT, "images": ["a.png"]}]
    assert prepare(rows).notes == ["columns that are not read: images"]


def test_tools_beside_a_prompt_that_is_text_are_told(prepare):
    row = {"prompt": "return", "completion": " x", "tools": [{"name": "f"}]}
    (note,) = prepare([row], format="PromptCompletion").notes
    assert note.startswith("cells of the column tools are not used: the row has no messages (rows with them: 1")


def test_keys_of_messages_that_nothing_reads_are_named(prepare, chatml):
    messages = [{**CHAT[0], "mood": "sad", "tool_call_id": "1"}, {**CHAT[1], "loss_mask": 0, "is a patient": "x"}]
    notes = prepare([{"messages": messages}] * 2).notes
    assert notes == [
        f"keys {key} of messages, which the chat template does not name, have no effect"
        " (rows with them: 2, the first is row 1 (rows.jsonl, line 1))"
        for key in ("loss_mask", "mood")
    ]
    assert prepare([{"messages": messages}], chat_template=chatml + "{# mood loss_mask #}").notes == []
