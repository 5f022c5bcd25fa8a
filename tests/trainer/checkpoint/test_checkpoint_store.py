"""A checkpoint is whole or it is none; the newest whole one is found, whatever happened to the others."""

import json
import logging
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qlora_storage.object_store import open_store
from qlora_trainer.checkpoint.checkpoint_store import (
    MARKER,
    CheckpointStore,
    files_of,
    folder_of,
    pack_tensors,
    to_delete,
    unpack_tensors,
)
from qlora_trainer.errors import CheckpointError, PreemptedError, StorageError, UserError

RUN = "3f2a9c01-run"
OTHER = "77777777-run"


def save(store, step, eval_loss=None, ranks=2, size=100, **meta):
    """Write a checkpoint as the ranks do."""
    entries = [store.write_file(step, f"rank-{r}.bin", bytes([step % 256, r]) * size) for r in range(ranks)]
    store.commit(step, entries, meta, eval_loss)


def steps(uri):
    """Steps that have a folder, whole or not."""
    return sorted({int(key.split("/")[0].removeprefix("step-")) for key, _ in open_store(uri, "x").list()})


# ---------------------------------------------------------------------------------------------------------- round trip


def test_what_was_committed_comes_back(place):
    store = CheckpointStore(place, RUN, keep=3)
    save(store, 120, eval_loss=0.1 + 0.2, loss=1 / 3, cursor=[4, 7], nothing=None)
    found = CheckpointStore(place, RUN, keep=3).newest()
    assert (found.step, found.eval_loss) == (120, 0.1 + 0.2)
    assert found.meta == {"loss": 1 / 3, "cursor": [4, 7], "nothing": None}
    assert [e.name for e in found.entries] == ["rank-0.bin", "rank-1.bin"]
    assert found.read("rank-1.bin") == bytes([120, 1]) * 100
    assert CheckpointStore(place, RUN, keep=3).at(120).read("rank-0.bin") == bytes([120, 0]) * 100


def test_a_run_without_checkpoints_starts_anew(place):
    store = CheckpointStore(place, RUN, keep=3)
    assert store.newest() is None
    assert store.best() is None


def test_ranks_write_at_the_same_time(place):
    with ThreadPoolExecutor(8) as ranks:
        store = CheckpointStore(place, RUN, keep=1)
        entries = list(ranks.map(lambda r: store.write_file(5, f"rank-{r}.bin", bytes([r]) * 50_000), range(8)))
    store.commit(5, entries, {}, None)
    assert [store.newest().read(f"rank-{r}.bin")[0] for r in range(8)] == list(range(8))


def test_tensors_come_back_bit_for_bit():
    flat = torch.randn(8)
    tensors = {
        "bf16": torch.randn(3, 4).bfloat16(),
        "views-of-one-buffer": flat[:4],
        "other-view": flat[4:],
        "transposed": torch.randn(2, 5).T,
        "scalar": torch.tensor(7, dtype=torch.int64),
        "state": torch.get_rng_state(),
        "nan": torch.tensor([float("nan"), -0.0]),
        "empty": torch.empty(0, 3),
    }
    back = unpack_tensors(pack_tensors(tensors))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        # As bytes: NaN equals nothing, and -0.0 equals 0.0.
        assert torch.equal(back[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def test_bytes_that_are_no_tensors_are_not_unpickled():
    with pytest.raises(CheckpointError, match="safetensors"):
        unpack_tensors(b"\x80\x04cos\nsystem\n(S'true'\ntR.")


def test_the_marker_is_not_a_rank_s_to_write(tmp_path):
    with pytest.raises(ValueError, match="commit"):
        CheckpointStore(str(tmp_path), RUN, keep=1).write_file(1, MARKER, b"{}")


# -------------------------------------------------------------------------------------------------------------- damage


def _flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def _edit_marker(data):
    return data.replace(b'"step": 2', b'"step": 3')


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        pytest.param("rank-1.bin", _flip, "rank-1.bin is not what was written", id="one-bit-flipped"),
        pytest.param("rank-0.bin", lambda d: d[:-1], "rank-0.bin has 199 bytes, 200 were written", id="cut-short"),
        pytest.param("rank-0.bin", None, "rank-0.bin is missing", id="file-gone"),
        pytest.param(MARKER, lambda d: d[:40], "COMPLETE.json cannot be read", id="marker-cut-short"),
        pytest.param(MARKER, _edit_marker, "COMPLETE.json is not what was written", id="marker-edited"),
        pytest.param(MARKER, lambda _: b"[]", "COMPLETE.json cannot be read", id="marker-is-something-else"),
    ],
)
def test_a_broken_newest_checkpoint_is_passed_over_for_the_one_before(place, caplog, name, damage, said):
    store = CheckpointStore(place, RUN, keep=3)
    save(store, 1)
    save(store, 2)
    inside = name if name == MARKER else f"{files_of(1)}/{name}"
    files, key = open_store(place, "x"), f"{folder_of(2)}/{inside}"
    if damage:
        files.put(key, damage(files.get(key)))
    else:
        files.delete(key)
    with caplog.at_level(logging.WARNING):
        assert store.newest().step == 1
    assert "step 2 is broken" in caplog.text
    assert said in caplog.text


def test_checkpoints_that_are_all_broken_are_an_error_not_a_fresh_start(place):
    store = CheckpointStore(place, RUN, keep=3)
    save(store, 1)
    save(store, 2)
    for step in (1, 2):
        open_store(place, "x").put(f"{folder_of(step)}/{files_of(1)}/rank-0.bin", b"?")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint .* can be read: .*step-00000002/attempt-1/rank-0\.bin"
    ) as caught:
        store.newest()
    assert caught.value.exit_code == 46


def test_a_folder_without_its_marker_is_no_checkpoint(place):
    store = CheckpointStore(place, RUN, keep=3)
    store.write_file(1, "rank-0.bin", b"half of a checkpoint")
    assert store.newest() is None
    with pytest.raises(CheckpointError, match=r"COMPLETE\.json is missing"):
        store.at(1)


def test_a_file_that_changes_after_the_check_is_not_returned(place):
    store = CheckpointStore(place, RUN, keep=3)
    save(store, 1)
    found = store.newest()
    open_store(place, "x").put(f"{folder_of(1)}/{files_of(1)}/rank-0.bin", b"\0" * 200)
    with pytest.raises(CheckpointError, match="SHA-256"):
        found.read("rank-0.bin")
    with pytest.raises(CheckpointError, match=r"holds no rank-9\.bin; it holds rank-0\.bin, rank-1\.bin"):
        found.read("rank-9.bin")


KILLED_WRITERS = """
import os, signal, sys, time
from qlora_trainer.checkpoint.checkpoint_store import CheckpointStore

def newest():
    found = CheckpointStore(sys.argv[1], "run", keep=2).newest()
    return found.step if found else 0

for delay in (0.02, 0.05, 0.11, 0.17):
    writer = os.fork()
    if not writer:
        store, step = CheckpointStore(sys.argv[1], "run", keep=2), newest()
        while True:
            step += 1
            store.commit(step, [store.write_file(step, f"rank-{r}", bytes(40_000)) for r in range(2)], {}, None)
    time.sleep(delay)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    print(newest())
"""


def test_a_writer_killed_at_any_moment_leaves_a_checkpoint_that_verifies(tmp_path):
    command = [sys.executable, "-c", KILLED_WRITERS, tmp_path / "run"]
    found = [int(line) for line in subprocess.run(command, capture_output=True, check=True).stdout.split()]
    assert found == sorted(found)
    assert found[-1] > 0


def test_a_full_disk_is_told_and_leaves_earlier_checkpoints_whole(tmpfs):
    with tmpfs("size=1m") as folder:
        store = CheckpointStore(str(folder), RUN, keep=3)
        save(store, 1, size=50_000)
        with pytest.raises(StorageError, match=r"disk is full .* MiB free") as caught:
            save(store, 2, size=1_000_000)
        assert caught.value.exit_code == 47
        assert store.newest().step == 1
        save(store, 3, size=50_000)
        assert store.newest().step == 3


# --------------------------------------------------------------------------------------------------------- which remain


@pytest.mark.parametrize(
    ("committed", "folders", "losses", "keep", "goes"),
    [
        pytest.param(3, [1, 2, 3], {1: None, 2: None, 3: None}, 2, [1], id="all-but-the-newest"),
        pytest.param(4, [1, 2, 3, 4], {1: 0.5, 2: 0.9, 3: None, 4: 0.8}, 1, [2, 3], id="the-best-stays-besides"),
        pytest.param(3, [1, 2, 3], {1: 0.5, 2: 0.5, 3: 0.9}, 1, [1], id="of-equally-good-the-newer-stays"),
        pytest.param(2, [1, 2], {1: math.nan, 2: 0.9}, 1, [1], id="not-a-number-is-not-the-best"),
        pytest.param(2, [1, 2], {1: 9.0, 2: math.inf}, 1, [], id="infinity-is-not-the-best"),
        pytest.param(3, [1, 2, 3], {3: None}, 3, [1, 2], id="cut-short-ones-go"),
        pytest.param(90, [60, 90, 120], {60: None, 90: None, 120: None}, 1, [60, 120], id="passed-over-newer-ones-go"),
        pytest.param(1, [1], {1: None}, 3, [], id="fewer-than-allowed"),
    ],
)
def test_the_newest_and_the_best_remain(committed, folders, losses, keep, goes):
    assert to_delete(committed, folders, losses, keep) == goes


def test_a_commit_deletes_what_is_no_longer_needed(place):
    store = CheckpointStore(place, RUN, keep=2)
    store.write_file(1, "rank-0.bin", b"cut short")
    for step, loss in ((2, 0.5), (3, 0.9), (4, None), (5, 0.7)):
        save(store, step, eval_loss=loss)
    assert steps(place) == [2, 4, 5]
    assert store.best().step == 2
    assert store.newest().step == 5


def test_a_resume_behind_a_broken_checkpoint_keeps_what_it_writes(place):
    store = CheckpointStore(place, RUN, keep=2)
    save(store, 60)
    save(store, 120)
    open_store(place, "x").put(f"{folder_of(120)}/{files_of(1)}/rank-0.bin", b"?")
    resumed = CheckpointStore(place, RUN, keep=1)
    assert resumed.newest().step == 60
    save(resumed, 90)
    assert steps(place) == [90]
    assert resumed.newest().step == 90


def test_an_attempt_that_saves_a_step_again_and_dies_leaves_what_was_whole(place):
    save(CheckpointStore(place, RUN, keep=1), 50, loss=1)
    again = CheckpointStore(place, RUN, keep=1, attempt=2)
    again.write_file(50, "rank-0.bin", b"of the second attempt, which dies before its marker")
    found = CheckpointStore(place, RUN, keep=1, attempt=3).newest()
    assert (found.step, found.read("rank-0.bin")) == (50, bytes([50, 0]) * 100)


def test_an_attempt_that_was_taken_for_lost_deletes_nothing_of_the_one_that_goes_on(place):
    lost, newer = CheckpointStore(place, RUN, keep=3), CheckpointStore(place, RUN, keep=3, attempt=2)
    save(lost, 300)
    for step in (400, 500):
        save(newer, step)
    with pytest.raises(PreemptedError, match="attempt 2 has gone on from here and saved step"):
        save(lost, 310)
    assert newer.newest().step == 500
    assert {400, 500} <= set(steps(place))


def test_a_checkpoint_that_was_saved_before_its_evaluation_is_told_of_it(place):
    save(CheckpointStore(place, RUN, keep=3), 50, run={"step": 50}, worldSize=4)
    later = CheckpointStore(place, RUN, keep=3, attempt=2)
    later.amend(50, {"run": {"step": 50, "evaluated": True}}, 0.25)
    best = later.best()
    assert (best.step, best.eval_loss, best.read("rank-1.bin")) == (50, 0.25, bytes([50, 1]) * 100)
    assert best.meta == {"run": {"step": 50, "evaluated": True}, "worldSize": 4}


def test_a_broken_best_is_passed_over_for_the_next_best(place, caplog):
    store = CheckpointStore(place, RUN, keep=3)
    for step, loss in ((1, 0.5), (2, 0.6), (3, 0.7)):
        save(store, step, eval_loss=loss)
    open_store(place, "x").put(f"{folder_of(1)}/{files_of(1)}/rank-0.bin", b"?")
    with caplog.at_level(logging.WARNING):
        assert store.best().step == 2
    assert "step 1 is broken" in caplog.text


def test_another_run_s_checkpoints_are_neither_read_nor_deleted(place):
    theirs = CheckpointStore(place, OTHER, keep=3)
    save(theirs, 7, eval_loss=0.1)
    ours = CheckpointStore(place, RUN, keep=1)
    with pytest.raises(UserError, match=f"holds checkpoints of run {OTHER}, this is run {RUN}"):
        ours.newest()
    save(ours, 8, eval_loss=0.9)
    save(ours, 9, eval_loss=0.8)
    assert steps(place) == [7, 9]
    assert ours.newest().step == ours.best().step == 9
    assert theirs.newest().step == 7


def test_trouble_in_deleting_does_not_undo_a_commit(place, caplog):
    store = CheckpointStore(place, RUN, keep=1)
    save(store, 1)
    # A marker nobody can read is no reason to stop a training run either.
    open_store(place, "x").put(f"{folder_of(1)}/{MARKER}", json.dumps({"sha256": 1}).encode())
    save(store, 2)
    assert steps(place) == [2]
