from __future__ import annotations

import bz2
import gzip
import json
from typing import TYPE_CHECKING

import datasets
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
import pytest

from qlora_trainer.data.rows.read import Row
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

FIELD = "spec.dataset.train.source"
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


def write_bzip2(path: Path) -> Path:
    (path / "rows.jsonl.bz2").write_bytes(bz2.compress(lines(ROWS).encode()))
    return path / "rows.jsonl.bz2"


def write_zstd(path: Path) -> Path:
    """In two frames, as appending to a log makes them."""
    frames = [pa.compress(lines(rows).encode(), "zstd", asbytes=True) for rows in (ROWS[:3], ROWS[3:])]
    (path / "ROWS.JSONL.ZST").write_bytes(b"".join(frames))
    return path / "ROWS.JSONL.ZST"


def write_utf16(path: Path) -> Path:
    (path / "rows.ndjson").write_text(lines(ROWS), "utf-16")
    return path / "rows.ndjson"


def write_array_after_mark_and_blank_line(path: Path) -> Path:
    (path / "rows.json").write_text("\ufeff\n" + json.dumps(ROWS), "utf-8")
    return path / "rows.json"


def write_objects_over_several_lines(path: Path) -> Path:
    (path / "rows.json").write_text("\n".join(json.dumps(row, indent=2) for row in ROWS), "utf-8")
    return path / "rows.json"


def write_tsv(path: Path) -> Path:
    cells = [[row["prompt"].replace('"', '""'), row["completion"]] for row in ROWS]
    (path / "rows.tsv").write_text("\n".join('"{}"\t{}'.format(*row) for row in [["prompt", "completion"], *cells]))
    return path / "rows.tsv"


def write_csv_utf16(path: Path) -> Path:
    """As Excel saves it."""
    write_csv(path)
    (path / "rows.csv").write_text((path / "rows.csv").read_text("utf-8"), "utf-16")
    return path / "rows.csv"


def write_arrow_file(path: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path / "rows.arrow", table.schema) as file:
        file.write_table(table, 3)
    return path / "rows.arrow"


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
    """Out of order and in several forms, beside what hubs leave there."""
    (path / "sub" / "sub").mkdir(parents=True)
    (path / "sub" / "sub" / "c.jsonl.zst").write_bytes(pa.compress(lines(ROWS[5:]).encode(), "zstd", asbytes=True))
    (path / "b.JSONL").write_text(lines(ROWS[3:5]), "utf-8")
    (path / "a.ndjson").write_text(lines(ROWS[:3]), "utf-8")
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
        pytest.param(write_bzip2, id="json-lines-bzip2"),
        pytest.param(write_zstd, id="json-lines-zstd-in-capitals"),
        pytest.param(write_utf16, id="json-lines-utf16"),
        pytest.param(write_array, id="json-array"),
        pytest.param(write_array_after_mark_and_blank_line, id="json-array-after-byte-order-mark-and-blank-line"),
        pytest.param(write_objects_over_several_lines, id="json-objects-over-several-lines"),
        pytest.param(write_parquet, id="parquet"),
        pytest.param(write_csv, id="csv-with-quotes-and-newlines-in-cells"),
        pytest.param(write_csv_gzip, id="csv-compressed"),
        pytest.param(write_tsv, id="tsv"),
        pytest.param(write_csv_utf16, id="csv-utf16"),
        pytest.param(write_arrow_file, id="arrow"),
        pytest.param(write_folder, id="folder-and-sub-folders-sorted-by-name"),
        pytest.param(write_parquet_folder, id="folder-of-parquet-with-other-column-order"),
        pytest.param(write_saved, id="saved-dataset-in-shards"),
        pytest.param(write_saved_splits, id="saved-splits-give-train"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(write, tmp_path, open_rows):
    rows = open_rows(write(tmp_path))
    batches = list(rows.batches(most_rows=3))
    assert [len(batch.rows) for batch in batches] == [3, 3, 1]
    assert [row for batch in batches for row in batch.rows] == WANTED
    assert [place.number for batch in batches for place in batch.places] == list(range(1, 8))
    assert rows.count() == 7


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_messages_survive_every_kind_of_file_that_can_hold_lists(kind, tmp_path, read_rows):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(lines(CHATS))
    elif kind == "parquet":
        pa_parquet.write_table(pa.Table.from_pylist(CHATS), path)
    else:
        datasets.Dataset.from_list(CHATS).save_to_disk(str(path))
    assert read_rows(path, {"messages": "spec.dataset.columns.messages"}) == CHATS


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "saved"])
def test_an_optional_column_that_is_not_there_reads_as_none(kind, tmp_path, read_rows):
    path = {"jsonl": write_jsonl, "parquet": write_parquet, "csv": write_csv, "saved": write_saved}[kind](tmp_path)
    rows = read_rows(path, {"prompt": "spec.dataset.columns.prompt"}, ["input"])
    assert rows[2] == {"prompt": ROWS[2]["prompt"], "input": None}


def test_csv_cells_stay_text(tmp_path, read_rows):
    (tmp_path / "rows.csv").write_text("prompt,completion\n007,\nNA,true\n")
    assert read_rows(tmp_path / "rows.csv") == [
        {"prompt": "007", "completion": ""},
        {"prompt": "NA", "completion": "true"},
    ]


def test_json_rows_need_not_have_the_same_types(tmp_path, read_rows):
    """Tool calls do not: pyarrow's own reader refuses these."""
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"a": {"x": 1}}]}\n{"messages": [{"a": {"x": "1"}}]}\n')
    rows = read_rows(tmp_path / "rows.jsonl", {"messages": "spec.dataset.columns.messages"})
    assert rows[1] == {"messages": [{"a": {"x": "1"}}]}


def test_reading_a_saved_dataset_writes_nothing(tmp_path, open_rows):
    path = write_saved(tmp_path)
    before = sorted(path.rglob("*"))
    assert open_rows(path).count() == 7
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
        pytest.param(empty_folder, 'rows" has no files in it; it must be a file', id="empty-folder"),
        pytest.param(
            mixed_folder, "it holds rows.jsonl, rows.parquet (JSON Lines and Parquet)", id="folder-of-two-types"
        ),
        pytest.param(text("rows.jsonl", "\n"), "has no rows; at least one is needed", id="empty-json-lines"),
        pytest.param(text("rows.csv", "prompt,completion\n"), "has no rows", id="csv-with-header-only"),
        pytest.param(text("rows.csv", ""), "has no rows", id="empty-csv"),
        pytest.param(empty_saved, "has no rows", id="empty-saved-dataset"),
        pytest.param(
            text("rows.jsonl", '{"prompt": 1, "completion": 2}\n{"prompt'),
            "cannot be read as JSON Lines: rows.jsonl, line 2: Unterminated string starting at (column 2)",
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
def test_a_source_that_cannot_be_used_is_named_with_what_is_allowed(write, allowed, tmp_path, read_rows):
    with pytest.raises(UserError) as caught:
        read_rows(write(tmp_path))
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
def test_a_missing_column_is_reported_at_the_field_that_names_it(write, tmp_path, read_rows):
    path = write(tmp_path)
    with pytest.raises(UserError) as caught:
        read_rows(path, {"prompt": "spec.dataset.columns.prompt", "answer": "spec.dataset.columns.completion"})
    assert str(caught.value) == (
        f'spec.dataset.columns.completion: "answer" is not a column of {path}; its columns are'
        " completion, prompt, unused"
    )


MESSAGES = {"messages": "spec.dataset.columns.messages"}
CALLS = [
    {"role": "user", "content": "W?"},
    {"role": "assistant", "tool_calls": [{"name": "w", "arguments": {"xs": [1, None, 2]}}]},
]


def map_type() -> pa.DataType:
    return pa.list_(pa.map_(pa.string(), pa.string()))


@pytest.mark.parametrize(
    ("column", "want"),
    [
        pytest.param(pa.array([CALLS]), CALLS, id="padding-of-structs-goes-and-nulls-of-lists-stay"),
        pytest.param(
            pa.array([[[("role", "user"), ("content", None)]]], map_type()),
            [{"role": "user", "content": None}],
            id="maps-keep-their-nulls",
        ),
        pytest.param(
            pa.array([{"role": ["user", "assistant"], "content": ["Q", None]}]),
            {"role": ["user", "assistant"], "content": ["Q", None]},
            id="struct-of-lists",
        ),
        pytest.param(
            pa.ExtensionArray.from_storage(pa.json_(), pa.array(['[{"role": "user", "content": null}]'])),
            [{"role": "user", "content": None}],
            id="json-columns",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_values_of_nested_columns_are_kept(column, want, kind, tmp_path, read_rows):
    table = pa.table({"messages": column})
    if kind == "parquet":
        pa_parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
    assert read_rows(tmp_path / f"a.{kind}", MESSAGES) == [{"messages": want}]


def test_nulls_of_json_are_kept(tmp_path, read_rows):
    rows = [{"messages": [{"role": "user", "a": None, "b": {"c": [None, {"d": None}]}}]}]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    assert read_rows(tmp_path / "a.jsonl", MESSAGES) == rows


def test_mixed_types_of_a_saved_dataset_are_what_they_were(tmp_path, read_rows):
    """Datasets keeps them as JSON text."""
    rows = [{"messages": [{"role": "a", "arguments": {"x": value}}]} for value in (1, "abc", [1, None])]
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(str(tmp_path / "saved"))
    assert read_rows(tmp_path / "saved", MESSAGES) == rows


def test_columns_with_dots_in_their_names_are_no_paths(tmp_path, read_rows):
    table = pa.table({"prompt": ["q"], "completion": ["a"], "prompt.raw": ["z"], "meta": [{"x": 1}]})
    pa_parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [{"prompt": "q", "completion": "a"}]
    needed = {"prompt.raw": "spec.dataset.columns.prompt"}
    assert read_rows(tmp_path / "a.parquet", needed) == [{"prompt.raw": "z"}]


def test_files_of_other_nested_types_make_one_set(tmp_path, read_rows):
    for name, message in (("a", {"role": "user"}), ("b", {"role": "user", "name": "x"})):
        pa_parquet.write_table(pa.table({"messages": [[message]]}), tmp_path / f"{name}.parquet")
    assert read_rows(tmp_path, MESSAGES) == [
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "name": "x"}]},
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_file_without_the_column_is_named(kind, tmp_path, read_rows):
    for name, columns in (("a", ("prompt", "completion")), ("b", ("question", "answer"))):
        table = pa.table({column: ["x"] for column in columns})
        if kind == "parquet":
            pa_parquet.write_table(table, tmp_path / f"{name}.parquet")
        elif kind == "csv":
            pa_csv.write_csv(table, tmp_path / f"{name}.csv")
        else:
            (tmp_path / f"{name}.jsonl").write_text(lines(table.to_pylist()))
    with pytest.raises(UserError) as caught:
        read_rows(tmp_path)
    assert str(caught.value) == (
        f'spec.dataset.columns.prompt: "prompt" is not a column of b.{kind} in {tmp_path}; its columns are answer,'
        " question"
    )


def test_rows_are_counted_through_all_files_and_named_by_their_own(tmp_path, places):
    (tmp_path / "p0.jsonl").write_text(lines(ROWS))
    (tmp_path / "p1.jsonl").write_text("\n\n" + lines(ROWS))
    (tmp_path / "p2.json").write_text(json.dumps(ROWS))
    named = [str(place) for place in places(tmp_path)]
    assert named[6:8] == ["7 (p0.jsonl, line 7)", "8 (p1.jsonl, line 3)"]
    assert named[-1] == "21 (p2.json, element 7)"


def test_lines_of_csv_are_those_where_the_row_begins(tmp_path, places):
    (tmp_path / "a.csv").write_text('prompt,completion\n"a\nb",c\n\nd,e\n')
    assert [place.within for place in places(tmp_path / "a.csv")] == ["line 2", "line 5"]


def test_rows_inside_an_object_are_named(tmp_path, read_rows):
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}))
    with pytest.raises(UserError, match=r'its columns are data. "data" is a list of such rows: write each on a line'):
        read_rows(tmp_path / "a.json")


def test_conversations_under_another_name_are_named(tmp_path, read_rows):
    (tmp_path / "a.jsonl").write_text(lines([{"conversations": [{"from": "human", "value": "Q"}]}]))
    with pytest.raises(UserError, match=r"Set spec\.dataset\.columns\.messages to conversations"):
        read_rows(tmp_path / "a.jsonl", MESSAGES)


def test_a_batch_ends_with_its_bytes_too(tmp_path, open_rows):
    (tmp_path / "a.jsonl").write_text(lines([{"prompt": "x" * 1000, "completion": ""}] * 7))
    batches = list(open_rows(tmp_path / "a.jsonl").batches(most_bytes=3000))
    assert [len(batch.rows) for batch in batches] == [3, 3, 1]
    assert batches[-1].done == (tmp_path / "a.jsonl").stat().st_size
