"""Files that are cut, or hold several: what is in them is read whole, or refused."""

from __future__ import annotations

import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_trainer.errors import UserError

FIELD = "spec.dataset.train.source"
ROWS = [{"prompt": f"question {i}", "completion": f"äöü {i}"} for i in range(7)]
WANTED = ROWS


def lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def arrow_bytes(kind: str) -> tuple[bytes, int]:
    """Rows in two batches, and where the second begins; -1 and 0 at the end look like the mark of the end."""
    table = pa.table({"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"], "n": pa.array([1, -1, 0], pa.int32())})
    sink = pa.BufferOutputStream()
    writer = (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(sink, table.schema)
    with writer:
        writer.write_table(table.slice(0, 2).combine_chunks())
        start = sink.tell()
        writer.write_table(table.slice(2).combine_chunks())
    return sink.getvalue().to_pybytes(), start


def test_an_arrow_stream_that_is_cut_anywhere_is_refused(tmp_path, read_rows):
    whole, second = arrow_bytes("stream")
    path = tmp_path / "rows.arrow"
    path.write_bytes(whole)
    assert len(read_rows(path)) == 3
    for end in (second, len(whole) - 8, len(whole) - 4, second + 40, second - 8):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"cannot be read as Arrow: rows\.arrow: is (cut off|damaged)"):
            read_rows(path)


@pytest.mark.parametrize(
    ("kind", "problem"), [("stream", "has more after its end"), ("file", "has more than its footer lists")]
)
def test_arrow_files_one_after_another_are_refused(tmp_path, read_rows, kind, problem):
    whole, _ = arrow_bytes(kind)
    path = tmp_path / "rows.arrow"
    path.write_bytes(whole)
    assert len(read_rows(path)) == 3
    path.write_bytes(whole * 2)
    with pytest.raises(UserError, match=problem):
        read_rows(path)


@pytest.mark.parametrize("indexes", [False, True])
def test_parquet_files_one_after_another_are_refused(tmp_path, read_rows, indexes):
    parts = []
    for number, rows in enumerate((ROWS[:2], ROWS)):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, write_page_index=indexes, row_group_size=2)
        parts.append(path.read_bytes())
        assert read_rows(path) == rows
    joined = tmp_path / "joined.parquet"
    for first, second in (parts, parts[::-1]):
        joined.write_bytes(first + second)
        with pytest.raises(UserError, match="several Parquet files must be in a file each"):
            read_rows(joined)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_that_is_there_twice_is_said_as_of_csv(tmp_path, read_rows, kind):
    table = pa.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "prompt"])
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match=f"rows.{kind}: has a column twice"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("rows.jsonl", gzip.compress(lines(ROWS).encode()), "gzip"),
        ("rows.csv", bz2.compress(lines(ROWS).encode()), "bzip2"),
        ("rows.json", pa.compress(lines(ROWS).encode(), "zstd", asbytes=True), "zstd"),
        ("rows.jsonl.gz", gzip.compress(gzip.compress(lines(ROWS).encode())), "gzip"),
        ("rows.csv", b"PK\x03\x04" + bytes(40), "ZIP"),
        ("rows.jsonl", b"PAR1" + bytes(40), "Parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_packed_under_the_name_of_a_text_is_said(tmp_path, read_rows, name, content, kind):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: is no text, but a {kind} file"):
        read_rows(tmp_path / name)


def test_a_text_that_begins_as_bzip2_does_is_read(tmp_path, read_rows):
    (tmp_path / "rows.csv").write_text("BZh,prompt,completion\n1,a,b\n")
    assert read_rows(tmp_path / "rows.csv") == [{"prompt": "a", "completion": "b"}]


def test_of_several_files_the_one_that_is_damaged_is_named(tmp_path, read_rows):
    for name in ("a", "b", "c"):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / f"{name}.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-6])
    with pytest.raises(UserError, match=r"Parquet: b\.parquet: is damaged"):
        read_rows(tmp_path)


@pytest.mark.parametrize("batches", [0, 1])
@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_with_dictionaries_compression_or_nothing_in_it_is_read_to_its_end(tmp_path, read_rows, new, batches):
    texts = pa.array(["a", "b", "a"]).dictionary_encode()
    table = pa.table({"prompt": texts, "completion": texts})
    with new(tmp_path / "a.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        for _ in range(batches):
            file.write_table(table)
    with new(tmp_path / "b.arrow", table.schema) as file:
        file.write_table(table)
    assert len(read_rows(tmp_path)) == 3 + 3 * batches


def test_rows_of_tsv_whose_cells_begin_with_a_quotation_mark_are_not_joined(tmp_path, read_rows):
    path = tmp_path / "rows.tsv"
    path.write_text('prompt\tcompletion\n"To be\tx\nor not\ty\nto be"\tz\n')
    with pytest.raises(UserError, match=r"rows\.tsv, line 2: has a cell that begins with .*, which ends 2 lines below"):
        read_rows(path)
    path.write_text('prompt\tcompletion\n"To be\nor not"\tx\ny\t"a\n\nb"\n"a\tb"\t"c\td\ne"\n')
    assert [row["prompt"] for row in read_rows(path)] == ["To be\nor not", "y", "a\tb"]


def test_quoted_cells_of_the_only_column_may_have_several_lines(tmp_path, read_rows):
    path = tmp_path / "rows.tsv"
    path.write_text('text\n"one\ntwo"\ntext\n')
    assert [row["text"] for row in read_rows(path, {"text": FIELD})] == ["one\ntwo", "text"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_files_of_csv_one_after_another_are_refused(tmp_path, read_rows, suffix, delimiter, mark):
    one = f"{mark}prompt{delimiter}completion\na{delimiter}b\n"
    path = tmp_path / f"rows.{suffix}"
    path.write_text(one)
    assert len(read_rows(path)) == 1
    path.write_text(one * 2)
    with pytest.raises(UserError, match=rf"rows\.{suffix}, line 3: is the beginning of another file"):
        read_rows(path)


@pytest.mark.parametrize("more", [b"garbage", bz2.compress(b"{}")[:-1], bz2.compress(b"{}")[4:]])
def test_what_follows_a_compressed_stream_and_is_none_is_refused(tmp_path, read_rows, more):
    streams = [bz2.compress(lines(rows).encode()) for rows in (ROWS[:3], ROWS[3:])]
    path = tmp_path / "rows.jsonl.bz2"
    path.write_bytes(b"".join(streams))
    assert read_rows(path) == ROWS
    path.write_bytes(b"".join(streams) + more)
    with pytest.raises(UserError, match=r"rows\.jsonl\.bz2: is (damaged|cut off), or no bzip2 file"):
        read_rows(path)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "zst"])
def test_compressed_rows_that_are_cut_or_followed_by_something_else_are_refused(tmp_path, read_rows, suffix):
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    whole = compress[suffix](lines(ROWS).encode())
    path = tmp_path / f"rows.jsonl.{suffix}"
    for data in (whole[:-1], whole[: len(whole) // 2], whole + b"garbage", b""):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"rows\.jsonl\.{suffix}"):
            read_rows(path)
