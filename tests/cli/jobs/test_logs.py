"""Whose line it is, and in which order."""

import pytest

from qlora_cli.jobs import log_printer, logs
from qlora_cli.jobs.logs import LogPod, Splitter
from qlora_cli.kube.errors import ClusterError

POD = LogPod("tune-1-0-x", "uid", attempt=1, worker=2, started=True, ended=False)


def split(*texts, pod=POD):
    splitter = Splitter(pod)
    return [splitter.line(f"2026-01-01T00:00:0{n}.5Z {text}".encode()) for n, text in enumerate(texts)]


def ranks(*texts):
    return [line.rank for line in split(*texts)]


def test_a_rank_names_itself():
    lines = split("2026-01-01 00:00:01,000 rank 5 INFO step 1", "2026-01-01 00:00:01,000 rank 6 INFO step 1")
    assert [logs.prefix(line) for line in lines] == ["rank 5", "rank 6"]
    assert lines[0].text == "2026-01-01 00:00:01,000 rank 5 INFO step 1"


def test_a_line_of_nobody_belongs_to_the_only_rank_so_far():
    assert ranks("[NCCL] hello", "d t rank 0 INFO a", "print of a library") == [None, 0, 0]


def test_among_several_ranks_only_what_is_indented_follows_the_one_before():
    assert ranks("d t rank 0 INFO a", "d t rank 1 ERROR b", "  File x", "Traceback") == [0, 1, 1, None]


def test_workers_and_preparing_pods_have_names_of_their_own():
    (line,) = split("d t worker 2 INFO meets")
    assert logs.prefix(line) == "worker 2"
    (line,) = split("reads", pod=LogPod("p", "u", attempt=logs.PREPARE, worker=0, started=True, ended=False))
    assert logs.prefix(line) == "prepare"


def test_times_sort_as_texts_though_the_kubelet_cuts_zeros():
    stamps = [
        "2026-01-01T00:00:01Z",
        "2026-01-01T00:00:01.05Z",
        "2026-01-01T00:00:01.5Z",
        "2026-01-01T00:00:01.500000001Z",
    ]
    even = [logs._even(stamp) for stamp in stamps]
    assert even == sorted(even)
    assert len({len(stamp) for stamp in even}) == 1


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("5m", 300), ("2h", 7200), ("1d", 86400), (None, None)])
def test_since(text, seconds):
    assert log_printer.parse_since(text) == seconds


@pytest.mark.parametrize("text", ["5", "5 m", "0s", "yesterday", "-5m"])
def test_since_that_is_none(text):
    with pytest.raises(ClusterError, match=f'--since: "{text}" must be a number with a unit'):
        log_printer.parse_since(text)


def test_a_local_runs_log(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"name": "quick", "attempts": [{"number": 1}, {"number": 2}]}')
    for step in ("prepare", "attempt-1", "attempt-2"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "log.txt").write_text(f"{step} a\n{step} b\n")
    log_printer.print_local(tmp_path, None, prepare=False, tail=None)
    assert capsys.readouterr().out == "attempt-2 a\nattempt-2 b\n"
    log_printer.print_local(tmp_path, 1, prepare=False, tail=1)
    assert capsys.readouterr().out == "attempt-1 b\n"
    log_printer.print_local(tmp_path, None, prepare=True, tail=0)
    assert capsys.readouterr().out == ""
    with pytest.raises(ClusterError, match="logs are there of attempt-1, attempt-2, prepare"):
        log_printer.print_local(tmp_path, 7, prepare=False, tail=None)


def test_a_local_runs_log_is_followed_until_its_process_ends(tmp_path, capsys, monkeypatch):
    import os
    import threading

    monkeypatch.setattr(log_printer, "LOOK_SECONDS", 0.05)
    run = tmp_path / "runs" / "quick"
    (run / "attempt-1").mkdir(parents=True)
    (run / "run.json").write_text('{"name": "quick", "attempts": [{"number": 1}]}')
    log, lock = run / "attempt-1" / "log.txt", tmp_path / "runs" / ".quick.lock"
    log.write_text("one\n")
    lock.write_text(str(os.getpid()))

    def end():
        with log.open("a") as file:
            file.write("two\n")
        lock.write_text("")

    threading.Timer(0.3, end).start()
    log_printer.print_local(run, None, prepare=False, tail=None, follow=True)
    assert capsys.readouterr().out == "one\ntwo\n"
