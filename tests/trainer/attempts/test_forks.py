"""Forked programs are what executed ones are, but for their imports."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys

import pytest

from qlora_api.contract import ExitCode
from testing.forks import start_program
from testing.timeouts import PATIENCE_SECONDS

SHOWS = """
import json, os, signal, sys
handlers = [repr(signal.getsignal(number)) for number in map(signal.Signals, (15, 2, 13, 25))]
print(json.dumps([sys.argv, __name__, os.environ["WORD"], os.getcwd(), handlers, sys.path[0]]))
sys.exit(7)
"""
STARTS = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: None)
done = subprocess.run([sys.executable, "-u", *sys.argv[1:]], env={"WORD": "inner"}, stdout=subprocess.PIPE, text=True)
print(done.stdout.strip(), flush=True)
child = subprocess.Popen([sys.executable, *sys.argv[1:3], "--", "torch"], env={"WORD": "x"}, start_new_session=True)
child.wait()
print(done.returncode, child.returncode, flush=True)
"""
NAMES_THREADS = """
import os, sys
from pathlib import Path
server = os.getppid()
tasks = [task for task in Path(f"/proc/{server}/task").iterdir() if task.name != str(server)]
print("torch" in sys.modules, "peft" in sys.modules, {(task / "comm").read_text().strip() for task in tasks})
"""
HARMLESS_THREADS = {"jemalloc_bg_thd"}
"""Threads of pyarrow's allocator, which prepares for forks by itself."""
SLEEPS = "import signal; print('ready', flush=True); signal.pause()"
FAILS = "raise OSError('no more')"


@pytest.fixture
def program(tmp_path):
    """Writes a script; its path."""

    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return str(path)

    return write


def run(tmp_path, *words, **environment):
    log = tmp_path / "output.txt"
    log.write_text("")
    code = start_program(words, log, environment or None).wait(timeout=PATIENCE_SECONDS)
    return code, log.read_text()


def test_a_forked_program_shows_what_an_executed_one_shows(program, tmp_path):
    script = program("shows", SHOWS)
    executed = subprocess.run(
        [sys.executable, script, "a", "b"], env={**os.environ, "WORD": "w"}, capture_output=True, text=True, check=False
    )
    assert run(tmp_path, script, "a", "b", WORD="w") == (executed.returncode, executed.stdout)


def test_what_a_forked_program_starts_is_forked_from_it_and_shows_the_same(program, tmp_path):
    script = program("shows", SHOWS)
    code, output = run(tmp_path, program("starts", STARTS), script, "a")
    argv, name, word, _, handlers, _ = json.loads(output.splitlines()[0])
    assert (argv, name, word) == ([script, "a"], "__main__", "inner")
    assert "SIG_DFL" in handlers[0], "the handler of the one that started it is not its own"
    assert "default_int_handler" in handlers[1]
    assert all("SIG_IGN" in handler for handler in handlers[2:]), "of SIGPIPE and SIGXFSZ, as Python has them"
    assert output.splitlines()[-1] == "7 7"
    assert code == 0


def test_the_server_has_imported_all_and_started_no_thread_whose_locks_a_fork_would_miss(program, tmp_path):
    code, output = run(tmp_path, program("names", NAMES_THREADS))
    torch, peft, threads = output.split(maxsplit=2)
    assert (code, torch, peft) == (0, "True", "True")
    assert threads == "set()" or ast.literal_eval(threads) <= HARMLESS_THREADS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_a_forked_program_as_any_other(program, tmp_path, number):
    log = tmp_path / "output.txt"
    log.touch()
    process = start_program([program("sleeps", SLEEPS)], log)
    while "ready" not in log.read_text():
        assert process.poll() is None, log.read_text()
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE_SECONDS) == -number


def test_an_error_is_in_the_output_and_the_exit_code(program, tmp_path):
    code, output = run(tmp_path, program("fails", FAILS))
    assert code == 1
    assert "OSError: no more" in output


def test_the_trainer_as_a_forked_program_refuses_a_broken_configuration_with_a_trace(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    code, output = run(tmp_path, "-m", "qlora_trainer", str(path))
    assert code not in (0, ExitCode.DONE)
    assert "TrainerConfig" in output
