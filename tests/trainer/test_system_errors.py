"""Errors of the operating system end each of the trainer's programs in a sentence and an exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from qlora_api.contract import ExitCode
from qlora_storage.errors import PathError, StorageError, UserError
from qlora_trainer import __main__ as worker
from qlora_trainer import verify
from qlora_trainer.errors import system_errors
from qlora_trainer.prepare import command


def full(tmp_path):
    with Path("/dev/full").open("w", buffering=1) as device:  # the kernel's own disk that is full
        device.write("x\n")


def missing(tmp_path):
    (tmp_path / "missing").read_bytes()


def directory(tmp_path):
    tmp_path.read_bytes()


def too_long(tmp_path):
    (tmp_path / ("x" * 300)).write_bytes(b"")


def no_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "file" / "below").read_bytes()


def full_for_safetensors(tmp_path):
    save_file({"a": torch.zeros(100_000)}, tmp_path / "mounted" / "a.safetensors")


def full_for_tokenizers(tmp_path):
    words = {f"word {number}": number for number in range(10_000)}
    Tokenizer(WordLevel(words, unk_token="word 0")).save(str(tmp_path / "mounted" / "tokenizer.json"))


@pytest.mark.parametrize("refused", [full_for_safetensors, full_for_tokenizers])
def test_a_full_disk_is_one_for_libraries_in_rust_too(tmp_path, tmpfs, refused):
    """Their errors are no OSError."""
    with (
        tmpfs("size=64k"),
        pytest.raises(StorageError, match=r"No space left on device \(os error 28\)"),
        system_errors(),
    ):
        refused(tmp_path)


def test_an_error_of_a_job_stays_what_it_is():
    error = UserError("spec.model.source", "a", "cannot be read (os error 28)")
    with pytest.raises(UserError) as caught, system_errors():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("refused", "kind", "words"),
    [
        (full, StorageError, "No space left on device"),
        (missing, PathError, "missing: No such file or directory"),
        (directory, PathError, "Is a directory"),
        (too_long, PathError, "File name too long"),
        (no_folder, PathError, "Not a directory"),
    ],
)
def test_what_the_system_refuses_is_an_error_of_its_kind(tmp_path, refused, kind, words):
    with pytest.raises(kind, match=words), system_errors():
        refused(tmp_path)


def test_another_error_of_the_system_stays_what_it_is():
    with pytest.raises(ConnectionResetError), system_errors():
        raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize("main", [worker.main, command.main])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys, main):
    for path in (tmp_path / "missing.json", tmp_path):
        monkeypatch.setattr(sys, "argv", ["qlora_trainer", str(path)])
        with pytest.raises(SystemExit, match=str(PathError.exit_code)):
            main()
        assert str(path) in capsys.readouterr().err


def test_verify_names_a_file_that_is_no_manifest(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert verify.main([str(path)]) == ExitCode.USER_ERROR
    said = "is not a manifest of this operator (Invalid JSON: EOF while parsing a value at line 1 column 0)"
    assert capsys.readouterr() == ("", f'manifest: "{path}" {said}; choose another destination\n')
