"""Places that nothing can be written to: a sentence, an exit code, and nothing half-written or replaced."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from plain_qlora import qlora
from published_folders import manifest, publish
from qlora_cli.artifacts import adapters, merge

USER_ERROR, STORAGE_FAILED = 40, 47
CONFIG = "adapter/adapter_config.json"


@dataclass(frozen=True)
class BadPlace:
    """A place, and what is said of it."""

    id: str
    make: Callable[[Path], Path]
    """Given an empty folder, makes the place and returns its path."""
    said: str
    merge: bool = True
    """Bad for a merged model, too."""


def make_file(folder: Path) -> Path:
    (folder / "bad").write_text("mine")
    return folder / "bad"


def make_folder(*files: str, mode: int = 0o700) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "bad").mkdir()
        for name in files:
            (folder / "bad" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "bad" / name).write_text("mine")
        (folder / "bad").chmod(mode)
        return folder / "bad"

    return make


def make_link(target: str, name: str = "bad") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)
        return folder / "bad"

    return make


def make_folder_for_a_file(folder: Path) -> Path:
    (folder / "bad" / CONFIG).mkdir(parents=True)
    return folder / "bad"


def make_other_adapter(folder: Path) -> Path:
    make_folder("manifest.json", CONFIG)(folder)
    (folder / "bad" / "manifest.json").write_bytes(manifest(job="other"))
    return folder / "bad"


PLACES = (
    BadPlace("file", make_file, "bad"),
    BadPlace("path-through-a-file", lambda folder: make_file(folder) / "below", "Not a directory"),
    BadPlace("read-only-folder", make_folder(mode=0o500), "Permission denied"),
    BadPlace("below-a-read-only-folder", lambda folder: make_folder(mode=0o500)(folder) / "a", "Permission denied"),
    BadPlace("folder-without-rights", make_folder(mode=0), "Permission denied"),
    BadPlace("long-name", lambda folder: folder / ("n" * 300), "File name too long"),
    BadPlace("link-to-itself", make_link("bad"), "bad"),
    BadPlace("link-to-nothing", make_link("nowhere/at-all"), "bad"),
    BadPlace("foreign-file", make_folder("adapter/tokenizer.json"), "bad: "),
    BadPlace("another-adapter", make_other_adapter, "bad: "),
    BadPlace("file-for-a-folder", make_folder("adapter"), "adapter", merge=False),
    BadPlace("folder-for-a-file", make_folder_for_a_file, "Is a directory", merge=False),
    BadPlace("link-for-a-folder", make_link("nowhere", "bad/adapter"), "bad/adapter", merge=False),
)


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text("latin-1") for path in folder.rglob("*") if path.is_file()}


def check_refused(ended, code: int, said: str) -> None:
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert "Traceback" not in ended.err
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    yield folder
    subprocess.run(["chmod", "-R", "u+rwx", folder], check=True)


@pytest.fixture
def published(tmp_path):
    return publish(tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "bad"),
    [
        pytest.param(command, bad, id=f"{command.partition(' ')[0]}-{bad.id}")
        for command in ("download {source}/ --to {path}", "merge {source}/ --out {path}")
        for bad in PLACES
        if bad.merge or command.startswith("download")
    ],
)
def test_a_place_that_cannot_be_used_is_told_and_stays_as_it_is(place, published, command, bad):
    path = bad.make(place)
    before = files_of(place)
    check_refused(qlora(command.format(source=published, path=path)), USER_ERROR, bad.said)
    subprocess.run(["chmod", "-R", "u+rwx", place], check=True)
    assert files_of(place) == before


@pytest.mark.parametrize("command", ["download {source}/ --to {path}", "merge {source}/ --out {path}"])
def test_a_read_only_file_system_is_told(tmpfs, published, command):
    with tmpfs("ro,size=4k") as folder:
        ended = qlora(command.format(source=published, path=folder / "new"))
    check_refused(ended, USER_ERROR, f"{folder}/new")
    assert "Read-only file system" in ended.err


def test_a_disk_that_is_full_keeps_the_whole_files_and_no_part_of_one(tmpfs, published):
    with tmpfs("size=16k") as folder:
        ended = qlora(f"download {published}/ --to {folder}/new")
        check_refused(ended, STORAGE_FAILED, f"{folder}/new/adapter/adapter_model.safetensors: No space left on device")
        assert files_of(folder) == {f"new/{CONFIG}": "{}"}


def test_a_download_that_was_killed_goes_on(published, place):
    (place / "adapter").mkdir()
    (place / "adapter" / ".adapter_model.safetensors.partial").write_text("begun")
    assert qlora(f"download {published}/ --to {place}").code == 0
    assert sorted(path.name for path in (place / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("job", ["../elsewhere", "{folder}/elsewhere", "..", "~", "a/b", "", None, 7, "x" * 53])
def test_a_manifest_does_not_choose_a_place_by_the_name_of_its_job(tmp_path, monkeypatch, job):
    name = job.format(folder=tmp_path) if isinstance(job, str) else job
    publish(tmp_path / "out", data=manifest(job=name))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert qlora("download ../out/").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"here", "out"}
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"adapter" if name != 7 else "7"}


def test_a_merged_model_comes_into_a_folder_that_is_there(place):
    """As the mount point of a volume, whose parent may be on another file system."""
    with merge.output_folder(place) as folder:
        (folder / "config.json").write_text("{}")
        assert not (place / "config.json").exists()
    assert files_of(place) == {"config.json": "{}"}


def test_of_a_merge_that_fails_no_file_is_left(place):
    def fail() -> None:
        with merge.output_folder(place) as folder:
            (folder / "config.json").write_text("{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(place.iterdir()) == []


def test_an_adapter_stays_where_another_was_to_be_laid(place, published):
    assert qlora(f"download {published}/ --to {place}").code == 0
    before = files_of(place)
    other = {f"b-attempt-1/adapter/{name}": b"[]" for name in adapters.REQUIRED}
    publish(place.parent / "other", other, manifest(other, adapter="b-attempt-1/adapter"))
    check_refused(qlora(f"download {place.parent}/other/ --to {place}"), USER_ERROR, f"{adapters.ELSEWHERE}")
    assert files_of(place) == before
