from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
import pytest

from qlora_api.batch import BatchSplit
from qlora_api.spec import Columns
from qlora_trainer.data.batches import Batches
from qlora_trainer.data.formats import Encoder
from qlora_trainer.errors import StorageError, UserError
from qlora_trainer.prepare.tokenize_rows import load_prepared_data, prepare_data
from qlora_trainer.storage.fetch import take_name

if TYPE_CHECKING:
    from qlora_trainer.data.tokenized_rows import TokenizedRows

PAIRS = {"format": "PromptCompletion"}


@pytest.fixture
def prepared(tokenizer, job, jsonl, tmp_path):
    """Prepare rows under settings; the cache is the test's own."""

    def run(rows, eval_rows=None, tokenizer=tokenizer, tokenizer_hash="t1", **fields):
        own = jsonl(eval_rows, "eval.jsonl") if eval_rows else None
        spec = job(**{**PAIRS, **fields}, eval_source="eval" if own else None)
        return prepare_data(spec, tokenizer, tokenizer_hash, jsonl(rows), own, tmp_path / "cache")

    return run


def contents(rows: TokenizedRows) -> list[list[int]]:
    return [rows.row(i)[0].tolist() for i in range(len(rows))]


def test_rows_on_disk_are_what_the_encoder_gives_in_order(prepared, tokenizer, dataset, pairs):
    data = prepared(pairs)
    wanted = [row.examples[0] for row in Encoder(tokenizer, dataset(**PAIRS)).encode_batch(pairs)]
    assert contents(data.train) == [encoded.input_ids for encoded in wanted]
    assert [data.train.row(i)[1].tolist() for i in range(len(pairs))] == [encoded.targets for encoded in wanted]
    assert data.train.lengths.tolist() == [len(encoded.input_ids) for encoded in wanted]
    assert data.train.target_counts.tolist() == [sum(encoded.targets) for encoded in wanted]
    assert (data.eval, data.eval_packs) == (None, None)
    assert (data.train.tokens.dtype, data.train.offsets.dtype) == (np.int32, np.int64)


def test_the_receipt_adds_up(prepared, pairs):
    data = prepared(pairs, max_length=256)
    receipt = data.receipt
    assert receipt.train_rows == len(data.train) == len(pairs)
    assert receipt.train_tokens == data.train.lengths.sum() == len(data.train.tokens)
    assert receipt.train_target_tokens == data.train.targets.sum()
    assert receipt.train_sequences == len(data.train_packs) < len(pairs)
    assert receipt.longest == data.train.lengths.max()
    assert receipt.packing_efficiency == pytest.approx(receipt.train_tokens / (256 * len(data.train_packs)))
    assert 0.9 < receipt.packing_efficiency <= 1
    assert (receipt.truncated, receipt.dropped, receipt.fully_masked, receipt.eval_rows) == (0, 0, 0, 0)
    assert json.loads((data.folder / "receipt.json").read_text("utf-8"))["dataHash"] == data.folder.name


def test_samples_show_what_counts(prepared, pairs):
    rows = [
        {"prompt": "what is ä?", "completion": " a letter 🙂"},
        *pairs[:9],
        {"prompt": "b" * 3000, "completion": "c"},
    ]
    first, middle, last = prepared(rows, max_length=4096).receipt.samples
    assert first == "what is ä?⟦ a letter 🙂<eos>⟧"
    assert middle == f"{pairs[4]['prompt']}⟦{pairs[4]['completion']}<eos>⟧"
    assert last.startswith("bbb")
    assert " tokens … " in last
    assert last.endswith("⟦c<eos>⟧")


def test_the_receipt_counts_rows_that_give_several_examples_and_what_a_template_leaves_out(prepared, chat_tokenizer):
    template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}.{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    rows = [
        {"messages": chat},
        {"messages": chat[:2]},
        {"messages": [{"role": "system", "content": "Be brief."}, *chat[:2]]},
        {"messages": [chat[0], {"role": "assistant", "content": ""}]},
    ]
    data = prepared(rows, format="Messages", chat_template=template, tokenizer=chat_tokenizer)
    receipt = data.receipt
    assert (receipt.rows, receipt.train_rows, receipt.split_rows) == (4, 4, 1)
    assert (receipt.left_out, receipt.empty_turns, receipt.fully_masked) == (2, 1, 1)


def test_packing_off_makes_every_row_a_sequence(prepared, pairs):
    data = prepared(pairs, packing=False)
    assert data.receipt.train_sequences == len(data.train_packs) == len(pairs)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_the_kind_of_file_makes_no_difference(suffix, prepared, pairs, job, tokenizer, tmp_path):
    path = tmp_path / f"same.{suffix}"
    if suffix == "parquet":
        pa_parquet.write_table(pa.Table.from_pylist(pairs), path)
    elif suffix == "csv":
        pa_csv.write_csv(pa.Table.from_pylist(pairs), path)
    else:
        path.write_text("".join(json.dumps(row, indent=None) + "\n\n" for row in pairs))
    data = prepare_data(job(**PAIRS), tokenizer, "t1", path, None, tmp_path / "other")
    assert contents(data.train) == contents(prepared(pairs).train)


# --------------------------------------------------------------------------------------------------------------- cache


def test_the_same_contents_are_not_tokenized_again(prepared, pairs, tokenizer, job, jsonl, tmp_path, monkeypatch):
    first = prepared(pairs)
    marker = first.folder / "train" / "tokens.npy"
    written = marker.stat().st_mtime_ns
    elsewhere = jsonl(pairs, "renamed.jsonl")
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenized again"))
    monkeypatch.setattr(type(tokenizer), "encode", lambda *_, **__: pytest.fail("tokenized again"))
    second = prepare_data(job(**PAIRS), tokenizer, "t1", elsewhere, None, tmp_path / "cache")
    assert second.folder == first.folder
    assert marker.stat().st_mtime_ns == written
    assert second.receipt == first.receipt
    assert contents(second.train) == contents(first.train)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"tokenizer_hash": "t2"}, id="tokenizer"),
        pytest.param({"loss_on": "All"}, id="loss"),
        pytest.param({"max_length": 512}, id="max-length"),
        pytest.param({"long_rows": "Drop"}, id="long-rows"),
        pytest.param({"packing": False}, id="packing"),
        pytest.param({"columns": Columns(prompt="completion", completion="prompt")}, id="columns"),
        pytest.param({"format": "Text", "columns": Columns(text="prompt")}, id="format"),
        pytest.param({"fraction": "0.2"}, id="held-out-fraction"),
        pytest.param({"eval_rows": [{"prompt": "a", "completion": "b"}]}, id="own-evaluation-rows"),
    ],
)
def test_whatever_changes_the_result_changes_its_name(change, prepared, pairs):
    assert prepared(pairs).folder != prepared(pairs, **change).folder


def test_a_changed_row_changes_the_name(prepared, pairs):
    assert prepared(pairs).folder != prepared([*pairs[1:], pairs[0]]).folder


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"seed": 2}, id="seed-with-nothing-held-out"),
        pytest.param({"columns": Columns(messages="m", text="t")}, id="columns-of-other-formats"),
        pytest.param({"loss_on": "Completion"}, id="default-written-out"),
    ],
)
def test_what_does_not_change_the_result_keeps_its_name(change, prepared, pairs):
    assert prepared(pairs).folder == prepared(pairs, **change).folder


def test_the_tokenizers_own_template_is_part_of_the_name(prepared, chat_tokenizer, chatml, chatml_marked):
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    settings = {"format": "Messages", "tokenizer": chat_tokenizer}
    own = prepared(chats, **settings)
    assert prepared(chats, chat_template=chatml, **settings).folder == own.folder
    assert prepared(chats, chat_template=chatml_marked, **settings).folder != own.folder


def test_ranks_load_the_folder_without_a_tokenizer(prepared, pairs):
    data = prepared(pairs, fraction="0.25")
    again = load_prepared_data(data.folder)
    assert contents(again.train) == contents(data.train)
    assert contents(again.eval) == contents(data.eval)
    assert again.train_packs.members.tolist() == data.train_packs.members.tolist()
    assert again.eval_packs.offsets.tolist() == data.eval_packs.offsets.tolist()
    assert again.receipt == data.receipt


def test_nothing_is_left_behind_by_a_preparation_that_fails(prepared, pairs, tmp_path):
    with pytest.raises(UserError):
        prepared([*pairs, {"prompt": None, "completion": "x"}])
    assert list((tmp_path / "cache" / "data").iterdir()) == []
    assert len(prepared(pairs).train) == len(pairs)


def test_of_two_preparations_at_once_the_first_to_finish_stays(tmp_path):
    mine, theirs = tmp_path / ".mine", tmp_path / "name"
    mine.mkdir()
    theirs.mkdir()
    (theirs / "receipt.json").write_text("theirs")
    take_name(mine, theirs)
    assert (theirs / "receipt.json").read_text() == "theirs"


def test_a_cache_that_cannot_be_written_is_the_storages_fault(job, tokenizer, jsonl, pairs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot put the tokenized rows into"):
        prepare_data(job(**PAIRS), tokenizer, "t1", jsonl(pairs), None, tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_a_fraction_is_held_out_by_the_seed(prepared, pairs):
    data = prepared(pairs, fraction="0.1", seed=1)
    assert (data.receipt.eval_rows, data.receipt.train_rows) == (10, 90)
    assert sorted(contents(data.train) + contents(data.eval)) == sorted(contents(prepared(pairs).train))
    other = prepared(pairs, fraction="0.1", seed=2)
    assert contents(other.eval) != contents(data.eval)
    assert data.receipt.eval_tokens == data.eval.lengths.sum()


def test_own_evaluation_rows_stand_apart(prepared, pairs):
    data = prepared(pairs[:50], eval_rows=pairs[50:])
    assert (len(data.train), len(data.eval)) == (50, 50)
    assert len(data.eval_packs) >= 1


def test_repeated_rows_and_rows_on_both_sides_are_counted(prepared, pairs):
    unique = list({json.dumps(row): row for row in pairs}.values())[:20]
    receipt = prepared(
        [*unique, unique[3], unique[3]], eval_rows=[*unique[5:7], unique[6], {"prompt": "new", "completion": "x"}]
    ).receipt
    assert (receipt.train_rows, receipt.duplicates, receipt.eval_rows, receipt.eval_in_train) == (22, 2, 4, 3)


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [pytest.param(3, "0.1", 0, id="too-small"), pytest.param(1, "0.5", 0, id="one-row")]
)
def test_a_fraction_that_leaves_a_side_empty_is_refused(count, fraction, held, prepared, pairs):
    with pytest.raises(UserError) as caught:
        prepared(pairs[:count], fraction=fraction)
    assert str(caught.value).startswith(
        f'spec.dataset.eval.fraction: "{fraction}" holds out {held} of {count} rows; at least one row must be held out'
    )


# ------------------------------------------------------------------------------------------------ long and masked rows

LONG = [{"prompt": "def " * 3, "completion": "x"}, {"prompt": "def " * 40, "completion": "x"}]
LONGER = [*LONG, {"prompt": "def " * 60, "completion": "x"}]


def test_rows_that_are_too_long_are_all_counted_before_the_job_fails(prepared, tmp_path):
    with pytest.raises(UserError) as caught:
        prepared(LONGER, max_length=32)
    longest = prepared(LONGER, max_length=4096).receipt.longest
    assert str(caught.value) == (
        f"spec.dataset.maxLength: 32 must be at least {longest}: 2 of the 3 rows of {tmp_path}/rows.jsonl are longer,"
        f" the longest is row 3 (rows.jsonl, line 3) with {longest} tokens. Raise maxLength, or set"
        " spec.dataset.longRows to Truncate (these lose their tail) or Drop (they are left out)"
    )


def test_an_evaluation_row_that_is_too_long_fails_the_job_too(prepared):
    with pytest.raises(UserError, match=r"32 must be at least .* 1 of the 2 rows of .*eval\.jsonl"):
        prepared(LONG[:1], eval_rows=LONG, max_length=32)


def test_dropped_rows_are_left_out_and_counted(prepared):
    receipt = prepared(LONGER, max_length=32, long_rows="Drop").receipt
    assert (receipt.train_rows, receipt.dropped, receipt.truncated, receipt.fully_masked) == (1, 2, 0, 0)


def test_rows_cut_before_their_completion_are_left_out_and_counted(prepared):
    """Their loss would be a silent zero (trl#6668)."""
    long_answer = {"prompt": "def ", "completion": "x = 1\n" * 40}
    data = prepared([*LONG, long_answer], max_length=32, long_rows="Truncate")
    assert (data.receipt.train_rows, data.receipt.truncated, data.receipt.fully_masked) == (2, 2, 1)
    assert data.train.lengths.tolist()[1] == 32
    assert data.receipt.longest > 100


def test_a_row_whose_only_target_is_its_first_token_has_nothing_to_predict_it_from(prepared, pairs):
    data = prepared([{"prompt": "", "completion": ""}, *pairs[:3]])
    assert (data.receipt.train_rows, data.receipt.fully_masked) == (3, 1)


def test_the_first_token_never_counts(prepared, tokenizer, pairs):
    data = prepared([{"text": row["completion"]} for row in pairs], format="Text")
    assert not any(data.train.row(i)[1][0] for i in range(len(data.train)))
    assert data.train.target_counts.tolist() == (data.train.lengths - 1).tolist()


@pytest.mark.parametrize(
    ("rows", "settings", "why"),
    [
        pytest.param(
            LONG[1:],
            {"max_length": 32, "long_rows": "Truncate"},
            "has 1 rows; 0 are left out as longer than maxLength 32, 1 are cut there, and in 1 no token counts. Raise"
            " spec.dataset.maxLength (the longest row has ",
            id="cut-before-the-completion",
        ),
        pytest.param(
            LONG[1:],
            {"max_length": 32, "long_rows": "Drop"},
            "1 are left out as longer than maxLength 32, 0 are cut there, and in 0 no token counts. Raise",
            id="all-dropped",
        ),
        pytest.param(
            [{"prompt": "", "completion": ""}],
            {},
            "Check that spec.dataset.columns names the right columns and that their texts are not empty",
            id="empty-texts",
        ),
    ],
)
def test_a_set_in_which_nothing_counts_is_refused(rows, settings, why, prepared):
    with pytest.raises(UserError) as caught:
        prepared(rows, **settings)
    assert str(caught.value).startswith(
        "spec.dataset: all labels are masked: none of the training rows has a token that counts for the loss."
    )
    assert why in str(caught.value)


def test_a_set_without_the_assistant_is_refused(prepared, chat_tokenizer):
    chats = [{"messages": [{"role": "user", "content": "a"}]}] * 2
    with pytest.raises(UserError, match=r'in 2 no token counts. Check that the rows have messages of role "assistant"'):
        prepared(chats, format="Messages", tokenizer=chat_tokenizer)


def test_evaluation_rows_in_which_nothing_counts_are_refused(prepared, pairs):
    with pytest.raises(UserError, match=r"none of the evaluation rows has a token .*eval\.jsonl has 1 rows"):
        prepared(pairs, eval_rows=[{"prompt": "", "completion": ""}])


def test_an_error_in_a_row_names_its_number_over_the_whole_set(prepared, pairs):
    rows = (pairs * 6)[:530]
    with pytest.raises(UserError, match=r'^spec.dataset.columns.prompt: "prompt" must hold text in every row; row 531'):
        prepared([*rows, {"prompt": None, "completion": "x"}])


def test_a_missing_column_is_reported_at_its_field(prepared, pairs):
    with pytest.raises(UserError, match=r'^spec.dataset.columns.text: "text" is not a column of .*completion, prompt$'):
        prepared(pairs, format="Text")


def test_a_missing_evaluation_source_is_reported_at_its_field(job, tokenizer, jsonl, pairs, tmp_path):
    with pytest.raises(UserError, match=r"^spec\.dataset\.eval\.source: .* is not there"):
        prepare_data(job(**PAIRS), tokenizer, "t1", jsonl(pairs), Path("/nowhere.jsonl"), tmp_path / "cache")


def test_the_data_order_can_be_prepared_and_run_end_to_end(prepared, pairs):
    """Prepare, load, and walk an epoch, as training does."""
    data = load_prepared_data(prepared(pairs, max_length=256).folder)
    split = BatchSplit(world_size=2, micro_batch_size=1, gradient_accumulation_steps=2)
    batches = Batches(data.train, data.train_packs, split, 0, 1)
    steps = list(batches.steps(0, batches.steps_per_epoch))
    assert sum(step.tokens for step in steps) == data.receipt.train_tokens
    assert sum(step.target_tokens for step in steps) == data.receipt.train_target_tokens
