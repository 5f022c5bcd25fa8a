"""Processes that import nothing from the working directory and cannot read what the trainer was given."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

import qlora_trainer
from qlora_trainer.bounded_child import BoundedChild, ChildBounds
from qlora_trainer.data.rows.arrow_rows import read_arrow
from qlora_trainer.data.rows.source import find_source
from qlora_trainer.liveness.watchdog import process_state

PACKAGE = Path(qlora_trainer.__file__).parent
WITHOUT_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--") if os.geteuid() == 0 else ()
"""Processes of root read everything otherwise; in pods nobody is root."""
SHADOWED = ("json", "resource", "struct", "pyarrow", "jinja2")


@pytest.fixture
def hostile_folder(tmp_path, monkeypatch):
    """A working directory with modules under the names of those that the children import."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in SHADOWED:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(folder)
    return tmp_path / "ran"


def test_the_reader_of_binary_files_imports_nothing_of_the_working_directory(hostile_folder, tmp_path):
    path = tmp_path / "a.parquet"
    pa_parquet.write_table(pa.table({"text": ["a", "b"]}), path)
    rows = read_arrow(find_source(path, "spec.dataset.train.source").files, ["text"], lambda *_: None)
    assert len(list(rows)) == 2
    assert not hostile_folder.exists()


def test_a_bounded_child_imports_nothing_of_the_working_directory_and_has_no_credentials(hostile_folder, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("QLORA_SECRET_0_HF_TOKEN", "secret")
    setup = {
        "template": "{{ messages[0].content }}",
        "variables": {},
        "tool_template": None,
        "tokens": [],
        "special": [],
    }
    child = BoundedChild("qlora_trainer.data.rendering.service:serve", setup, ChildBounds())
    assert child.call({"prompt": [{"role": "user", "content": "x"}]}) == {"text": "x"}
    assert not hostile_folder.exists()
    assert child._process is not None
    assert "secret" not in Path(f"/proc/{child._process.pid}/environ").read_text()


def test_every_python_is_started_by_the_one_command():
    """A child that is started in another way would import from the working directory."""
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "executable"
    }
    assert found == {"python_process.py"}


@pytest.mark.parametrize("module", ["qlora_trainer", "qlora_trainer.prepare", "qlora_trainer.prepare.child"])
@pytest.mark.parametrize("isolated", [True, False], ids=["as-in-pods", "as-qlora-run"])
def test_a_process_of_the_same_user_reads_no_environment_of_a_trainer_in_a_pod(module, isolated, tmp_path):
    """Each is looked at while it waits for its configuration."""
    config = tmp_path / "config.json"
    os.mkfifo(config)
    command = [*WITHOUT_CAPABILITIES, sys.executable, *(["-I"] if isolated else []), "-m", module, str(config)]
    environment = {**os.environ, "QLORA_SECRET_0_HF_TOKEN": "secret"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            writer = open_when_read(config, process)
            reader = [*WITHOUT_CAPABILITIES, "cat", f"/proc/{process.pid}/environ"]
            read = subprocess.run(reader, capture_output=True, check=False).stdout
            os.close(writer)
            assert (b"secret" in read) is not isolated
            assert process_state(process.pid), "the launcher reads this of its ranks"
        finally:
            process.kill()


def open_when_read(pipe, process):
    while True:
        assert process.poll() is None
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody reads it yet
                raise
            time.sleep(0.05)
