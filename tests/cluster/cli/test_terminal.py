"""On a terminal: colours, a screen that is left as it was found, and as little asked of the API server as it takes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest

from cluster.scenarios.jobs import in_state, job_path

_numbers = count()
COLOUR = re.compile(r"\x1b\[(?:\d+;)*3\d(?:;\d+)*m")
ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h", "\x1b[?1049l"


class Terminal:
    """A command on a pseudo-terminal of 30 rows."""

    def __init__(self, qlora, *arguments, columns=120, **environment):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "qlora_cli", *arguments, "-n", qlora.namespace],
            env={**plain, **qlora.environment, "TERM": "xterm-256color", **environment},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.said = ""

    def wait_for(self, text, seconds=30):
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < deadline, (text, self.said[-3000:])
            self._read(0.1)

    def end(self, seconds=20):
        """Read until it has ended; its exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.said[-3000:]
            self._read(0.1)
        self._read(0.1)
        return self.process.returncode

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def _read(self, seconds):
        while select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            self.said += data.decode(errors="replace")


@pytest.fixture
def terminal(qlora):
    @contextmanager
    def open_one(*arguments, caller=qlora, **more):
        running = Terminal(caller, *arguments, **more)
        try:
            yield running
        finally:
            running.close()

    return open_one


@pytest.fixture
def running_job(qlora, manifest, api):
    name = f"live-{next(_numbers)}"
    qlora("submit", manifest(name))
    api.wait_for(job_path(qlora.namespace, name), in_state("Running"))
    yield name
    qlora("cancel", name, "--yes")
    api.wait_gone(job_path(qlora.namespace, name))


def test_watch_draws_a_screen_and_leaves_what_it_said_last(terminal, qlora, running_job):
    with terminal("watch") as watch:
        watch.wait_for(running_job)
        watch.wait_for("Running")
        assert ENTER_SCREEN in watch.said
        assert COLOUR.search(watch.said)
        watch.process.send_signal(signal.SIGINT)
        assert watch.end() == 130
        left = watch.said.rpartition(LEAVE_SCREEN)[2]
        assert re.search(rf"{running_job}\s.*Running", left)
        assert "Traceback" not in watch.said


def test_no_color_is_honoured(terminal, running_job):
    with terminal("list", NO_COLOR="1") as listed:
        assert listed.end() == 0
        assert "Running" in listed.said
        assert not COLOUR.search(listed.said)
    with terminal("list") as listed:
        assert listed.end() == 0
        assert COLOUR.search(listed.said)


def test_a_watch_ends_with_its_jobs(terminal, qlora, manifest, api):
    qlora("submit", manifest("brief"))
    api.wait_for(job_path(qlora.namespace, "brief"), in_state("Running"))
    with terminal("watch", "brief") as watch:
        watch.wait_for("attempt 1")
        qlora("cancel", "brief", "--yes")
        assert watch.end() == 0


def allow_to_read(api, namespace, user):
    """The audit log has the reads of those who are not administrators."""
    rbac = "rbac.authorization.k8s.io"
    meta = {"name": user, "namespace": namespace}
    rules = [{"apiGroups": ["qlora.dev"], "resources": ["qlorajobs"], "verbs": ["get", "list", "watch"]}]
    api.create({"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": meta, "rules": rules})
    role = {"apiGroup": rbac, "kind": "Role", "name": user}
    who = [{"apiGroup": rbac, "kind": "User", "name": user}]
    api.create({"apiVersion": f"{rbac}/v1", "kind": "RoleBinding", "metadata": meta, "roleRef": role, "subjects": who})


def test_watching_asks_once(terminal, qlora, crd_cluster, running_job):
    """A list and a watch, however long it takes and whatever happens."""
    allow_to_read(crd_cluster.api, qlora.namespace, "watcher")
    watcher = replace(qlora, kubeconfig=crd_cluster.user_kubeconfig("watcher"))
    deadline = time.monotonic() + 20  # a new role counts a moment after it is made
    while watcher("list").code:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    mark = crd_cluster.audit_mark()
    with terminal("watch", caller=watcher) as watch:
        watch.wait_for("Running")
        for number in range(10):
            status = {"status": {"progress": {"step": number, "totalSteps": 10}}}
            crd_cluster.api.patch(f"{job_path(qlora.namespace, running_job)}/status", status)
            time.sleep(0.3)
        watch.wait_for("9/10")
        watch.process.send_signal(signal.SIGINT)
        watch.end()
    deadline = time.monotonic() + 20  # a watch is in the audit log once it has ended
    while len(asked := [(r.verb, r.resource) for r in crd_cluster.requests_since(mark) if r.user == "watcher"]) < 2:
        assert time.monotonic() < deadline, asked
        time.sleep(0.2)
    assert sorted(asked) == [("list", "qlorajobs"), ("watch", "qlorajobs")]


def test_cancel_asks_on_a_terminal(terminal, qlora, manifest, api):
    qlora("submit", manifest("asked", suspend=True))
    for answer, code, there in (("n", 1, True), ("y", 0, False)):
        with terminal("cancel", "asked") as cancel:
            cancel.wait_for("Delete it? [y/N] ")
            os.write(cancel.master, f"{answer}\n".encode())
            assert cancel.end() == code
        assert (qlora("show", "asked").code == 0) is there


def test_init_asks_three_questions(terminal, qlora, tmp_path):
    command = [sys.executable, "-m", "qlora_cli", "init", "--file", str(tmp_path / "job.yaml")]
    master, slave = pty.openpty()
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    for answer in ("hf://org/base@main", "s3://data/rows.jsonl", "s3://adapters/mine"):
        os.write(master, f"{answer}\n".encode())
    assert process.wait(30) == 0
    os.close(master)
    assert qlora("submit", tmp_path / "job.yaml", "--dry-run", "server").code == 0
