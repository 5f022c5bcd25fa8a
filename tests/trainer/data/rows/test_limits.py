"""Files that hold more than they seem to: each ends within bounds of time and memory, with its name."""

from __future__ import annotations

import bz2
import gzip
import json
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from qlora_trainer.data.rows import limits, text_stream
from qlora_trainer.data.rows.limits import MIB, MOST_ROW_BYTES, most_bytes
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

ROW = '{"prompt": "a", "completion": "b"}\n'
HUGE = 64 * MIB
ROW_LIMIT = "is larger than 16 MiB, the most that a row may have"


def nested(depth: int) -> str:
    return f'{{"prompt": "a", "completion": "b", "meta": {"[" * depth}{"]" * depth}}}'


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        pytest.param("a.jsonl", ROW + "x" * HUGE, f"a.jsonl, line 2: {ROW_LIMIT}", id="line"),
        pytest.param("a.jsonl.gz", gzip.compress(b"x" * HUGE, 1), f"a.jsonl.gz, line 1: {ROW_LIMIT}", id="gzip-line"),
        pytest.param("a.jsonl.bz2", bz2.compress(b"x" * HUGE), f"line 1: {ROW_LIMIT}", id="bzip2-line"),
        pytest.param("a.jsonl.zst", pa.compress(b"x" * HUGE, "zstd", asbytes=True), ROW_LIMIT, id="zstd-line"),
        pytest.param("a.json", '[{"prompt": "' + "x" * HUGE, f"a.json, element 1: {ROW_LIMIT}", id="array-element"),
        pytest.param("a.json", " " * HUGE, "has no rows", id="spaces"),
        pytest.param("a.csv", "prompt,completion\n" + "x" * HUGE, f"a.csv, line 2: {ROW_LIMIT}", id="csv-line"),
        pytest.param(
            "a.csv", 'prompt,completion\na,"' + "x\n" * (HUGE // 2), f"a.csv, line 2: {ROW_LIMIT}", id="csv-open-quote"
        ),
        pytest.param("a.csv", "a," * (HUGE // 2), f"a.csv, line 1: {ROW_LIMIT}", id="csv-header"),
        pytest.param("a.csv", "a," * 1_000_000 + "\n1", "line 1: has a column twice", id="csv-million-columns"),
        pytest.param(
            "a.csv", "prompt,completion\n" + "," * 1_000_000, "line 2: Expected 2 columns, got 1000001", id="csv-cells"
        ),
        pytest.param(
            "a.jsonl",
            '{"prompt": ' + "1" * 1_000_000 + "}",
            "line 1: has a number of more than 4,300 digits",
            id="digits",
        ),
        pytest.param(
            "a.json", '[{"prompt": ' + "1" * 10_000 + "}]", "element 1: has a number of more", id="array-digits"
        ),
        pytest.param("a.jsonl", nested(100_000), "a.jsonl, line 1: is nested too deep", id="nested"),
        pytest.param("a.json", f"[{nested(100_000)}]", "a.json, element 1: is nested too deep", id="array-nested"),
        pytest.param("a.json", "[" * 1_000_000, "a.json, element 1: ", id="array-of-arrays"),
        pytest.param("a.jsonl", b'{"prompt": "\\ud800"}', "line 1: has half of a surrogate pair", id="surrogate"),
        pytest.param(
            "a.json",
            b'[{"prompt": ["\\uDFFF"], "completion": 1}]',
            "element 1: has half of a surrogate pair",
            id="array-surrogate",
        ),
        pytest.param("a.jsonl", b"\xff\xfe\x00\xd8", "is no UTF-16", id="utf16-surrogate"),
        pytest.param(
            "a.jsonl", ROW.encode("utf-16-le"), "perhaps UTF-16 without a byte order mark", id="utf16-no-mark"
        ),
        pytest.param("a.jsonl", ROW.encode("utf-32"), "is in UTF-32; save it as UTF-8", id="utf32"),
        pytest.param("a.jsonl.gz", gzip.compress(ROW.encode())[:-9], "is cut off, or no gzip file", id="gzip-cut"),
        pytest.param("a.jsonl.bz2", bz2.compress(ROW.encode())[:-9], "is cut off, or no bzip2 file", id="bzip2-cut"),
        pytest.param("a.jsonl.zst", b"(\xb5/\xfd", "no zstd file", id="zstd-cut"),
    ],
)
def test_text_beyond_the_limits_is_named(name, data, problem, tmp_path, read_rows):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError) as caught:
        read_rows(tmp_path / name)
    assert f'"{tmp_path / name}" ' in str(caught.value)
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
    ],
    ids=["gzip", "bzip2", "zstd"],
)
def test_a_compressed_file_holds_a_bounded_multiple_of_its_size(suffix, compress, tmp_path, read_rows, monkeypatch):
    monkeypatch.setattr(limits, "ALWAYS_ALLOWED_BYTES", MIB)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress((ROW * (4 * MIB // len(ROW))).encode()))
    assert most_bytes(path.stat().st_size) < 4 * MIB
    with pytest.raises(UserError, match=r"of rows in \d+ bytes: a file may hold a GiB, or 200 times its own size"):
        read_rows(path)
    monkeypatch.setattr(text_stream, "most_bytes", lambda _: 8 * MIB)
    assert len(read_rows(path)) == 4 * MIB // len(ROW)


def parquet_of_one_repeated_text(path: Path) -> None:
    """As a dictionary page of one text, and a run of indices."""
    text = pa.array(["x" * (4 * MIB)])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), text)
    pa_parquet.write_table(pa.table({"prompt": column, "completion": column}), path)


def parquet_of_one_list(path: Path) -> None:
    length = 100_000_000
    cells = pa.ListArray.from_arrays([0, length], pa.nulls(length, pa.int8()))
    pa_parquet.write_table(pa.table([cells, pa.array(["b"])], ["prompt", "completion"]), path)


def arrow_of_one_list_of_nulls(path: Path) -> None:
    cells = pa.ListArray.from_arrays([0, 2_000_000_000], pa.nulls(2_000_000_000))
    table = pa.table([cells, pa.array(["b"])], ["prompt", "completion"])
    with pa.ipc.new_stream(path, table.schema) as file:
        file.write_table(table)


def arrow_with_offsets_beyond_its_text(path: Path) -> None:
    batch = pa.record_batch([pa.array(["x" * 77]), pa.array(["b"])], ["prompt", "completion"])
    with pa.ipc.new_stream(path, batch.schema) as file:
        file.write_batch(batch)
    data = bytearray(path.read_bytes())
    offsets = data.rindex((0).to_bytes(4, "little") + (77).to_bytes(4, "little"))
    data[offsets + 4 : offsets + 8] = (2_000_000_000).to_bytes(4, "little")
    path.write_bytes(data)


def parquet_with_another_footer_length(path: Path) -> None:
    pa_parquet.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), path)
    data = path.read_bytes()
    path.write_bytes(data[:-8] + (0x7FFFFFFF).to_bytes(4, "little") + data[-4:])


def parquet_of_deep_nesting(path: Path) -> None:
    value: object = 1
    for _ in range(300):
        value = [value]
    pa_parquet.write_table(pa.table({"prompt": [value], "completion": ["b"]}), path)


@pytest.mark.parametrize(
    ("write", "name", "problems"),
    [
        pytest.param(
            parquet_of_one_repeated_text, "a.parquet", ("needs more than 1024 MiB", "holds more than"), id="dictionary"
        ),
        pytest.param(parquet_of_one_list, "a.parquet", ("needs more than 1024 MiB", "larger than 16"), id="run-length"),
        pytest.param(arrow_of_one_list_of_nulls, "a.arrow", ("row 1: is larger than 16 MiB",), id="nulls"),
        pytest.param(arrow_with_offsets_beyond_its_text, "a.arrow", ("a.arrow: is damaged",), id="offsets"),
        pytest.param(parquet_with_another_footer_length, "a.parquet", ("a.parquet: is damaged",), id="footer"),
        pytest.param(parquet_of_deep_nesting, "a.parquet", ("a.parquet: is damaged",), id="nesting"),
    ],
)
def test_binary_files_beyond_the_limits_are_named(write, name, problems, tmp_path, open_rows):
    write(tmp_path / name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        open_rows(tmp_path / name).count()
    assert f'"{tmp_path / name}" cannot be read as ' in str(caught.value)
    assert any(problem in str(caught.value) for problem in problems)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024, "kibibytes of this process"


def test_a_large_text_in_a_binary_file_is_named_with_its_row(tmp_path, read_rows):
    texts = ["a", "b", "x" * (MOST_ROW_BYTES + 1), "c"]
    pa_parquet.write_table(pa.table({"prompt": texts, "completion": texts}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, row 3: is larger than 16 MiB"):
        read_rows(tmp_path / "a.parquet")


def test_values_that_are_no_rows_are_named_with_their_row(tmp_path, read_rows):
    texts = pa.array([b"a", b"\xff"]).view(pa.string())
    pa_parquet.write_table(pa.table({"prompt": texts, "completion": texts}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, row 2: has text that is no UTF-8"):
        read_rows(tmp_path / "a.parquet")
    pa_parquet.write_table(pa.table({"prompt": [b"a"], "completion": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, row 1: has a value of type bytes, which JSON has not"):
        read_rows(tmp_path / "a.parquet")


def test_a_reader_that_crashes_is_named(tmp_path, read_rows, monkeypatch):
    pa_parquet.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "a.parquet")
    crash = tmp_path / "crash" / "pyarrow"
    crash.mkdir(parents=True)
    (crash / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(crash.parent))
    with pytest.raises(UserError, match="its reader ended with SIGSEGV"):
        read_rows(tmp_path / "a.parquet")


def test_the_reader_of_binary_files_has_no_credentials(tmp_path, read_rows, monkeypatch):
    pa_parquet.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "a.parquet")
    shim = tmp_path / "shim" / "sitecustomize.py"
    shim.parent.mkdir()
    shim.write_text(f"import json, os\njson.dump(dict(os.environ), open({str(tmp_path / 'seen.json')!r}, 'w'))\n")
    monkeypatch.setenv("PYTHONPATH", str(shim.parent))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert len(read_rows(tmp_path / "a.parquet")) == 1
    assert "secret" not in (tmp_path / "seen.json").read_text()


READ_ALL = """
import resource, sys
from pathlib import Path
from qlora_trainer.data.rows.read import Rows
from qlora_trainer.data.rows.source import find_source

rows = Rows(find_source(Path(sys.argv[1]), "spec.dataset.train.source"), {"prompt": "spec.dataset.columns.prompt"})
print(rows.count(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_memory_does_not_grow_with_the_rows(kind, tmp_path):
    """Four MiB of rows against 128."""

    def most_mib(count: int) -> int:
        path = tmp_path / f"{count}.{kind}"
        rows = [{"prompt": f"{i} " + "x" * 4096} for i in range(1024)]
        write_many(path, kind, rows, count // len(rows))
        ended = subprocess.run([sys.executable, "-c", READ_ALL, path], capture_output=True, text=True, check=True)
        found, mib = ended.stdout.split()
        assert int(found) == count
        return int(mib)

    assert most_mib(32 * 1024) - most_mib(1024) < 48


def write_many(path: Path, kind: str, rows: list[dict[str, str]], times: int) -> None:
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        with pa_parquet.ParquetWriter(path, table.schema, use_dictionary=False) as file:
            for _ in range(times):
                file.write_table(table)
    elif kind == "arrow":
        with pa.ipc.new_stream(path, table.schema) as file:
            for _ in range(times):
                file.write_table(table, 256)
    elif kind == "csv":
        lines = "".join(f"{row['prompt']}\n" for row in rows)
        path.write_text("prompt\n" + lines * times)
    elif kind == "json":
        path.write_text("[" + ",\n".join(json.dumps(row) for row in rows * times) + "]")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) * times)


def test_an_array_on_one_line_may_be_longer_than_a_row(tmp_path, read_rows):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "x" * MIB, "completion": "b"}] * 20))
    assert len(read_rows(tmp_path / "a.json")) == 20
