"""Every command ends in a sentence where the system refuses something: a full disk, a right, a directory for a file."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
import yaml

from cli_builders import run_record
from plain_qlora import qlora
from published_folders import publish

CLUSTER_COMMANDS = (
    *("list", "show quick", "watch", "logs quick", "events quick", "suspend quick", "resume quick", "cancel quick -y"),
    *("retry quick", "download quick", "verify quick", "merge quick --out merged", "compare quick", "submit job.yaml"),
    "doctor",
)
READERS = (
    "validate {path}",
    "plan {path}",
    "run {path}",
    "submit {path}",
    "doctor {path}",
    "report {path}",
    "show {path}/",
    "logs {path}/",
    "compare {path}/ {path}/",
    "generate --adapter {path} --prompt a",
    "generate --run quick --runs-dir {path} --prompt a",
    "generate --adapter a --base b --prompts-file {path}",
    "verify {path}/",
    "verify {path}",
    "download {path}/",
    "merge {path}/ --out merged",
    "upload {path} s3://bucket/key",
    "list --runs-dir {path}",
    "run job.yaml --runs-dir {path}",
    "report quick --runs-dir {path}",
)
READ_KINDS = ("missing", "directory", "file-as-folder", "unreadable", "folder-unreadable", "too-long", "loop")
WRITERS = (
    "init -f {path} --model hf://a/b --data s3://c/d --destination s3://c/o",
    "report runs/quick --out {path}",
    "run job.yaml --runs-dir {path}",
)
WRITE_KINDS = ("directory", "file-as-folder", "folder-read-only", "too-long", "loop")
PRINTERS = (
    *("--help", "--version", "run --help", "validate job.yaml", "explain", "explain spec.lora", "crds"),
    *("init -f - --model hf://a/b --data s3://c/d --destination s3://c/o", "list", "list -o json", "show runs/quick"),
    *("compare runs/quick runs/quick", "logs runs/quick"),
)


@pytest.fixture
def here(workplace):
    """A folder with a manifest and the record of a run."""
    workplace.run_folder.mkdir(parents=True)
    record = {key: value for key, value in run_record("quick").items() if value is not None}
    (workplace.run_folder / "run.json").write_text(json.dumps(record))
    (workplace.run_folder / "attempt-1").mkdir()
    (workplace.run_folder / "attempt-1" / "log.txt").write_text("step 1\n" * 20_000)
    return workplace.folder


def bad_path(folder: Path, kind: str) -> Path:
    place = folder / "bad"
    match kind:
        case "directory":
            place.mkdir()
        case "file-as-folder":
            place.write_text("x")
            return place / "below"
        case "unreadable":
            place.write_text("x")
            place.chmod(0)
        case "folder-unreadable" | "folder-read-only":
            place.mkdir(mode=0 if kind == "folder-unreadable" else 0o500)
            return place / "below"
        case "too-long":
            return folder / ("n" * 300)
        case "loop":
            place.symlink_to("bad")
    return place


def check_said(ended, codes=(1, 2, 3, 40)):
    said = ended.err + ended.out
    assert "Traceback" not in said, said[-3000:]
    assert "Exception ignored" not in said, said[-3000:]
    assert "\x1b" not in said
    assert ended.code in codes, (ended.code, said[-3000:])
    assert ended.err.strip() or ended.out.strip()


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *product(READERS, READ_KINDS),
        *product([f"{command} --kubeconfig {{path}}" for command in CLUSTER_COMMANDS], ["folder-unreadable"]),
    ],
)
def test_what_cannot_be_read_is_told(here, command, kind):
    path = bad_path(here, kind)
    try:
        # A folder without runs and an empty kubeconfig are no errors.
        check_said(qlora(command.format(path=path)), codes=(0, 1, 2, 3, 40))
    finally:
        with suppress(OSError):
            (here / "bad").chmod(0o700)


@pytest.mark.parametrize("kind", WRITE_KINDS)
@pytest.mark.parametrize("command", WRITERS)
def test_what_cannot_be_written_is_told(here, command, kind):
    path = bad_path(here, kind)
    if (command, kind) == (WRITERS[-1], "directory"):
        pytest.skip("a folder of runs may be there")
    try:
        check_said(qlora(command.format(path=path)))
    finally:
        with suppress(OSError):
            (here / "bad").chmod(0o700)


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("read_only", [False, True], ids=["full", "read-only"])
def test_a_disk_that_is_full_or_read_only_is_told(here, tmpfs, command, read_only):
    with tmpfs("size=4k") as folder:
        (folder / "filled").write_bytes(bytes(4096))
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        ended = qlora(command.format(path=folder / "new"))
        check_said(ended, codes=(40,) if read_only else (47,))
        assert ("Read-only file system" if read_only else "No space left on device") in ended.err


@pytest.mark.parametrize("command", PRINTERS)
def test_a_full_disk_under_standard_output_is_told(here, command):
    full = os.open("/dev/full", os.O_WRONLY)
    ended = qlora(command, full)
    os.close(full)
    assert (ended.code, ended.err.splitlines()[-1]) == (47, "qlora: No space left on device")


@pytest.mark.parametrize("command", PRINTERS)
def test_whoever_reads_a_pipe_may_go(here, command):
    reader, writer = os.pipe()
    os.close(reader)
    ended = qlora(command, writer)
    os.close(writer)
    assert ended.err.partition("Next:")[0] == "", ended.err
    assert ended.code in (0, 1, 40)


STREAM_USERS = (*PRINTERS, "verify out/", "download out/ --to copy", "report quick", "validate -", "no-such-command")


@pytest.fixture
def with_adapter(here):
    publish(here / "out")
    return here


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=["stdout", "stderr", "all"])
@pytest.mark.parametrize("command", STREAM_USERS)
def test_a_stream_that_is_closed_ends_no_command(with_adapter, command, closed):
    """As with ``>&-``; no file of the command's own gets what was to be written there."""
    whole = qlora(command)
    ended = qlora(command, closed=closed)
    assert ended.code == whole.code, ended.err
    assert "Traceback" not in ended.err
    assert bool(ended.out) == (1 not in closed and bool(whole.out))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
@pytest.mark.parametrize("command", STREAM_USERS)
def test_an_encoding_that_lacks_characters_ends_no_command(with_adapter, command, encoding):
    ended = qlora(command, PYTHONIOENCODING=encoding)
    assert ended.code == qlora(command).code, ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_values_for_programs_stay_whatever_the_encoding(here, form):
    record = {**run_record("quick"), "spec": {"model": {"source": "/models/größe→\U0001f600"}}}
    (here / "runs" / "quick" / "run.json").write_text(json.dumps(record))
    written = qlora(f"show runs/quick -o {form}", PYTHONIOENCODING="ascii").out
    assert (json.loads if form == "json" else yaml.safe_load)(written)["spec"] == record["spec"]


@pytest.mark.parametrize("command", PRINTERS)
def test_in_a_pipe_nothing_is_coloured(here, command):
    ended = qlora(command)
    assert ended.code in (0, 40), ended.err
    assert ended.out
    assert "\x1b" not in ended.out + ended.err


@pytest.mark.parametrize("command", PRINTERS)
def test_with_no_color_nothing_is_coloured_on_a_terminal(here, command):
    (here / "runs" / "quick" / "attempt-1" / "log.txt").write_text("step 1\n")
    keyboard, terminal = pty.openpty()
    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(read_to_the_end, keyboard)
        ended = qlora(command, terminal, NO_COLOR="1", COLUMNS="80")
        os.close(terminal)
    os.close(keyboard)
    assert ended.code in (0, 40), ended.err
    assert shown.result()
    assert b"\x1b" not in shown.result()


def read_to_the_end(terminal: int) -> bytes:
    shown = b""
    with suppress(OSError):  # is the end of a terminal
        while part := os.read(terminal, 65536):
            shown += part
    return shown
