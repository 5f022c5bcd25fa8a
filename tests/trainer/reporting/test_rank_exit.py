"""Errors of libraries get the exit codes of the contract."""

from __future__ import annotations

import pytest
import torch

from qlora_api.contract import ExitCode, TerminationMessage
from qlora_trainer.errors import CheckpointError
from qlora_trainer.liveness.heartbeat import Section
from qlora_trainer.reporting.rank_exit import run_with_exit_code


class Config:
    """The one field of a TrainerConfig that is looked at."""

    def __init__(self, path):
        self.termination_message_path = str(path)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), ExitCode.OUT_OF_DEVICE_MEMORY, id="pytorch"),
        pytest.param(RuntimeError("CUDA error: out of memory"), ExitCode.OUT_OF_DEVICE_MEMORY, id="driver"),
        pytest.param(
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
            ExitCode.OUT_OF_DEVICE_MEMORY,
            id="cublas",
        ),
        pytest.param(MemoryError("cannot allocate"), ExitCode.OUT_OF_HOST_MEMORY, id="host"),
        pytest.param(
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            ExitCode.OUT_OF_HOST_MEMORY,
            id="pytorch-on-the-host",
        ),
        pytest.param(OSError(12, "Cannot allocate memory"), ExitCode.OUT_OF_HOST_MEMORY, id="system"),
        pytest.param(RuntimeError("Timed out waiting 1800000ms for recv"), ExitCode.STALLED, id="gloo-timeout"),
        pytest.param(
            RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer. GLHF!"),
            ExitCode.PEER_LOST,
            id="gloo-peer-gone",
        ),
        pytest.param(
            RuntimeError("NCCL error: remote process exited or there was a network error"),
            ExitCode.PEER_LOST,
            id="nccl-peer-gone",
        ),
        pytest.param(ConnectionResetError("Connection reset by peer"), ExitCode.CRASHED, id="another-connection"),
        pytest.param(OSError(28, "No space left on device", "/cache/x"), ExitCode.STORAGE_FAILED, id="disk-full"),
        pytest.param(CheckpointError("broken"), ExitCode.CHECKPOINT_UNREADABLE, id="own"),
        pytest.param(KeyError("x"), ExitCode.CRASHED, id="anything-else"),
    ],
)
def test_an_error_ends_with_its_code_and_a_termination_message(error, code, tmp_path):
    def work(_):
        raise error

    assert run_with_exit_code(Config(tmp_path / "word.json"), work) == code
    word = TerminationMessage.model_validate_json((tmp_path / "word.json").read_bytes())
    assert word.exit_code == code


def test_the_first_rank_to_fail_writes_the_termination_message(tmp_path):
    def work(text):
        def fail(_):
            raise RuntimeError(text)

        return fail

    run_with_exit_code(Config(tmp_path / "word.json"), work("the cause"))
    run_with_exit_code(Config(tmp_path / "word.json"), work("what followed"))
    assert "the cause" in (tmp_path / "word.json").read_text()


def test_a_rank_that_lost_a_peer_gives_way_to_one_that_knows_more(tmp_path):
    def work(error):
        def fail(_):
            raise error

        return fail

    word = tmp_path / "word.json"
    word.touch()  # in a pod the file is there from the start
    for error in (RuntimeError("Connection closed by peer"), MemoryError("the cause"), RuntimeError("Broken pipe")):
        run_with_exit_code(Config(word), work(error))
    assert "the cause" in word.read_text()


@pytest.mark.parametrize(
    ("section", "step", "said"),
    [
        pytest.param(Section.LOAD, 0, "in Load;", id="load"),
        pytest.param(Section.BACKWARD, 6, "in Backward of step 7;", id="step"),
        pytest.param(Section.CHECKPOINT, 6, "in Checkpoint;", id="save"),
    ],
)
def test_out_of_memory_names_the_phase_and_the_peak(section, step, said, tmp_path):
    def work(seen):
        seen.heartbeat.step = step
        with seen.heartbeat.during(section):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")

    assert run_with_exit_code(Config(tmp_path / "word.json"), work) == ExitCode.OUT_OF_DEVICE_MEMORY
    text = TerminationMessage.model_validate_json((tmp_path / "word.json").read_bytes()).message
    assert text.startswith(f"out of device memory {said} the peak of this rank was ")
    assert text.endswith("Tried to allocate 2.00 GiB")
