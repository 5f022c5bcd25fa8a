"""Paths as users write them, and files that are written as a whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from qlora_storage.local_paths import expand_home, whole_file, write_whole


@pytest.mark.parametrize(
    ("written", "expanded"),
    [("~/rows", "/home/me/rows"), ("~nosuchuser/rows", "~nosuchuser/rows"), ("rows/~", "rows/~"), ("", ".")],
)
def test_the_home_of_a_user_is_expanded(monkeypatch, written, expanded):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home(written) == Path(expanded)


def test_a_file_takes_the_place_of_another_when_it_is_complete(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]


def test_what_fails_in_between_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with whole_file(tmp_path / "a") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_a_disk_that_is_full_leaves_what_was_there_and_is_named(tmpfs):
    with tmpfs("size=64k") as folder:
        path = folder / "a"
        write_whole(path, "old")
        with pytest.raises(OSError, match="No space left on device") as caught:
            write_whole(path, "x" * 100_000)
        assert caught.value.filename == str(path)
        assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("a", "old")]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to("a")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_text() == "new"


def test_a_circle_of_links_is_refused_and_stays(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        write_whole(tmp_path / "a", "new")
    assert sorted(path.readlink().name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_pipe_is_written_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_mode_that_is_asked_for_is_the_files_from_its_beginning(tmp_path):
    path: Path = tmp_path / "key"
    (tmp_path / ".key.partial").write_text("of a process that was killed")
    with whole_file(path, 0o600) as file:
        file.write(b"secret")
        assert stat.S_IMODE((tmp_path / ".key.partial").stat().st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
