from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import datasets
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
import pytest

from qlora_trainer.data.sources import Row, load_rows
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

FIELD = "spec.dataset.train.source"
NEEDED = {"prompt": "spec.dataset.columns.prompt", "completion": "spec.dataset.columns.completion"}
ROWS: list[Row] = [
    {"prompt": f'question "{i}",\nwith a comma', "completion": f"äöü 🙂 {i}", "unused": i} for i in range(7)
]
WANTED = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]
CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"messages": [{"role": "user", "content": "bye"}]},
]


def lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(path: Path) -> Path:
    (path / "rows.jsonl").write_text(lines(ROWS), "utf-8")
    return path / "rows.jsonl"


def write_jsonl_with_blank_lines_and_mark(path: Path) -> Path:
    (path / "rows.json").write_text("\ufeff" + lines(ROWS).replace("\n", "\r\n\n"), "utf-8")
    return path / "rows.json"


def write_gzip(path: Path) -> Path:
    (path / "rows.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    return path / "rows.jsonl.gz"


def write_array(path: Path) -> Path:
    (path / "rows.json").write_text(json.dumps(ROWS, indent=1), "utf-8")
    return path / "rows.json"


def write_parquet(path: Path) -> Path:
    pa_parquet.write_table(pa.Table.from_pylist(ROWS), path / "rows.parquet", row_group_size=2)
    return path / "rows.parquet"


def write_csv(path: Path) -> Path:
    pa_csv.write_csv(pa.Table.from_pylist(ROWS), path / "rows.csv")
    return path / "rows.csv"


def write_csv_gzip(path: Path) -> Path:
    write_csv(path)
    (path / "rows.csv.gz").write_bytes(gzip.compress((path / "rows.csv").read_bytes()))
    return path / "rows.csv.gz"


def write_folder(path: Path) -> Path:
    """Out of order, beside what hubs leave there."""
    (path / "b.jsonl").write_text(lines(ROWS[3:]), "utf-8")
    (path / "a.jsonl").write_text(lines(ROWS[:3]), "utf-8")
    (path / "README.md").write_text("# Rows")
    (path / ".gitattributes").write_text("")
    return path


def write_parquet_folder(path: Path) -> Path:
    pa_parquet.write_table(pa.Table.from_pylist(ROWS[:3]), path / "0.parquet")
    pa_parquet.write_table(pa.Table.from_pylist(ROWS[3:]).select(["completion", "prompt"]), path / "1.parquet")
    return path


def write_saved(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).with_format("numpy").save_to_disk(str(path / "saved"), num_shards=2)
    return path / "saved"


def write_saved_splits(path: Path) -> Path:
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(path / "saved"))
    return path / "saved"


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(write_jsonl, id="json-lines"),
        pytest.param(write_jsonl_with_blank_lines_and_mark, id="json-lines-with-byte-order-mark-and-blank-lines"),
        pytest.param(write_gzip, id="json-lines-compressed"),
        pytest.param(write_array, id="json-array"),
        pytest.param(write_parquet, id="parquet"),
        pytest.param(write_csv, id="csv-with-quotes-and-newlines-in-cells"),
        pytest.param(write_csv_gzip, id="csv-compressed"),
        pytest.param(write_folder, id="folder-sorted-by-name"),
        pytest.param(write_parquet_folder, id="folder-of-parquet-with-other-column-order"),
        pytest.param(write_saved, id="saved-dataset-in-shards"),
        pytest.param(write_saved_splits, id="saved-splits-give-train"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(write, tmp_path):
    rows = load_rows(write(tmp_path), FIELD, NEEDED)
    batches = list(rows.batches(3))
    assert [start for start, _ in batches] == [0, 3, 6]
    assert [row for _, batch in batches for row in batch] == WANTED
    assert len(rows) == 7


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_messages_survive_every_kind_of_file_that_can_hold_lists(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(lines(CHATS))
    elif kind == "parquet":
        pa_parquet.write_table(pa.Table.from_pylist(CHATS), path)
    else:
        datasets.Dataset.from_list(CHATS).save_to_disk(str(path))
    rows = load_rows(path, FIELD, {"messages": "spec.dataset.columns.messages"})
    assert rows.read(0, 2) == CHATS


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "saved"])
def test_an_optional_column_that_is_not_there_reads_as_none(kind, tmp_path):
    path = {"jsonl": write_jsonl, "parquet": write_parquet, "csv": write_csv, "saved": write_saved}[kind](tmp_path)
    rows = load_rows(path, FIELD, {"prompt": "spec.dataset.columns.prompt"}, ["input"])
    assert rows.read(2, 3) == [{"prompt": ROWS[2]["prompt"], "input": None}]


def test_csv_cells_stay_text(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\n007,\nNA,true\n")
    rows = load_rows(tmp_path / "rows.csv", FIELD, NEEDED)
    assert rows.read(0, 2) == [{"prompt": "007", "completion": ""}, {"prompt": "NA", "completion": "true"}]


def test_json_rows_need_not_have_the_same_types(tmp_path):
    """Tool calls do not: pyarrow's own reader refuses these."""
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"a": {"x": 1}}]}\n{"messages": [{"a": {"x": "1"}}]}\n')
    rows = load_rows(tmp_path / "rows.jsonl", FIELD, {"messages": "spec.dataset.columns.messages"})
    assert rows.read(1, 2) == [{"messages": [{"a": {"x": "1"}}]}]


def test_reading_a_saved_dataset_writes_nothing(tmp_path):
    path = write_saved(tmp_path)
    before = sorted(path.rglob("*"))
    assert len(load_rows(path, FIELD, NEEDED)) == 7
    assert sorted(path.rglob("*")) == before


def nothing(path: Path) -> Path:
    return path / "missing.jsonl"


def text(name: str, content: str | bytes):
    def write(path: Path) -> Path:
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return path / name

    return write


def empty_folder(path: Path) -> Path:
    (path / "rows" / "inner").mkdir(parents=True)
    return path / "rows"


def mixed_folder(path: Path) -> Path:
    write_jsonl(path)
    write_parquet(path)
    return path


def splits_without_train(path: Path) -> Path:
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(path / "saved"))
    return path / "saved"


def empty_saved(path: Path) -> Path:
    datasets.Dataset.from_dict({"prompt": [], "completion": []}).save_to_disk(str(path / "saved"))
    return path / "saved"


def broken_saved(path: Path) -> Path:
    write_saved(path)
    next((path / "saved").glob("*.arrow")).write_bytes(b"no arrow")
    return path / "saved"


def saved_without_state(path: Path) -> Path:
    write_saved(path)
    (path / "saved" / "state.json").write_text("{}")
    return path / "saved"


@pytest.mark.parametrize(
    ("write", "allowed"),
    [
        pytest.param(nothing, 'missing.jsonl" is not there; must be a file that ends in .jsonl', id="missing-path"),
        pytest.param(text("rows.txt", "a"), 'rows.txt" is of no known type; must be a file', id="unknown-type"),
        pytest.param(empty_folder, 'rows" has no files in it itself (its folders are inner)', id="empty-folder"),
        pytest.param(mixed_folder, "it holds rows.jsonl, rows.parquet", id="folder-of-two-types"),
        pytest.param(text("rows.jsonl", "\n"), "has no rows; at least one is needed", id="empty-json-lines"),
        pytest.param(text("rows.csv", "prompt,completion\n"), "has no rows", id="csv-with-header-only"),
        pytest.param(text("rows.csv", ""), "cannot be read as CSV", id="empty-csv"),
        pytest.param(empty_saved, "has no rows", id="empty-saved-dataset"),
        pytest.param(
            text("rows.jsonl", '{"prompt": 1}\n{"prompt'),
            "cannot be read as JSON Lines: rows.jsonl, line 2: Unterminated string",
            id="json-cut-off",
        ),
        pytest.param(text("rows.jsonl", '"a"\n'), "line 1: must be an object such as", id="json-line-not-an-object"),
        pytest.param(text("rows.json", "[1]"), "element 1: must be an object", id="json-array-not-of-objects"),
        pytest.param(text("rows.jsonl", b'{"a": "\xff"}'), "cannot be read as JSON Lines", id="json-not-utf8"),
        pytest.param(text("rows.jsonl.gz", "{}"), "cannot be read as JSON Lines", id="not-compressed"),
        pytest.param(text("rows.parquet", "no parquet"), "cannot be read as Parquet", id="broken-parquet"),
        pytest.param(text("rows.csv", b"prompt,completion\na,\xff\n"), "cannot be read as CSV", id="csv-not-utf8"),
        pytest.param(broken_saved, "cannot be read as datasets.save_to_disk", id="broken-saved-dataset"),
        pytest.param(saved_without_state, "cannot be read as datasets.save_to_disk: state.json", id="broken-state"),
        pytest.param(splits_without_train, 'has no split "train"; point at one of its folders: test', id="no-train"),
    ],
)
def test_a_source_that_cannot_be_used_is_named_with_what_is_allowed(write, allowed, tmp_path):
    with pytest.raises(UserError) as caught:
        load_rows(write(tmp_path), FIELD, NEEDED)
    assert str(caught.value).startswith(f'{FIELD}: "{tmp_path}')
    assert allowed in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(write_jsonl, id="json-lines"),
        pytest.param(write_parquet, id="parquet"),
        pytest.param(write_csv, id="csv"),
        pytest.param(write_saved, id="saved"),
    ],
)
def test_a_missing_column_is_reported_at_the_field_that_names_it(write, tmp_path):
    path = write(tmp_path)
    with pytest.raises(UserError) as caught:
        load_rows(path, FIELD, {"prompt": "spec.dataset.columns.prompt", "answer": "spec.dataset.columns.completion"})
    assert str(caught.value) == (
        f'spec.dataset.columns.completion: "answer" is not a column of {path}; its columns are'
        " completion, prompt, unused"
    )
