"""The kernel's kill of a process is recognized: the counters of both versions of cgroups, and a real kill by the
kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qlora_trainer.liveness.cgroup import MemoryCgroup, OomWatch

V1 = {
    "proc/self/cgroup": "4:cpu,memory:/pod/abc\n0::/\n",
    "fs/memory/pod/abc/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "fs/memory/pod/abc/memory.limit_in_bytes": "2147483648\n",
    "fs/memory/pod/abc/memory.max_usage_in_bytes": "2147000000\n",
    "fs/memory/pod/abc/memory.usage_in_bytes": "1610612736\n",
    "fs/memory/pod/abc/memory.stat": "inactive_file 1\ntotal_inactive_file 268435456\ntotal_active_file 268435456\n",
}
V2 = {
    "proc/self/cgroup": "0::/pod/abc\n",
    "fs/pod/abc/memory.events": "low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n",
    "fs/pod/abc/memory.max": "2147483648\n",
    "fs/pod/abc/memory.current": "1610612736\n",
    "fs/pod/abc/memory.stat": "anon 7\nfile 9\ninactive_file 268435456\nactive_file 268435456\n",
}
IN_A_CONTAINER = {
    "proc/self/cgroup": "4:memory:/kubepods/pod1/abc\n",
    "fs/memory/memory.oom_control": "oom_kill 2\n",
    "fs/memory/memory.limit_in_bytes": "9223372036854771712\n",
}


def tree(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return MemoryCgroup.of_this_process(folder / "proc", folder / "fs")


@pytest.mark.parametrize(
    ("files", "limit"), [(V1, 2 << 30), (V2, 2 << 30), (IN_A_CONTAINER, None)], ids=["v1", "v2", "container"]
)
def test_counters_of_both_versions_are_found(tmp_path, files, limit):
    cgroup = tree(tmp_path, files)
    assert cgroup.oom_kills() == 2
    assert cgroup.limit_bytes() == limit
    assert cgroup.available_bytes() == (1 << 30 if limit else None), "pages of files can be freed"
    watch = OomWatch(cgroup)
    assert not watch.oom_killed()
    cgroup.events.write_text("oom_kill 3\n")
    assert watch.oom_killed()


def test_without_cgroups_nothing_is_claimed(tmp_path):
    assert MemoryCgroup.of_this_process(tmp_path, tmp_path) is None
    assert not OomWatch(None).oom_killed()


def test_a_kill_by_the_kernel_is_told_from_any_other(limited_memory):
    """A child that takes too much, and one that somebody kills, in a cgroup with a real limit."""
    cgroup = limited_memory(64 << 20)
    script = """
import os, signal, subprocess, sys
from qlora_trainer.liveness.cgroup import MemoryCgroup, OomWatch
for what in ("os.kill(os.getpid(), 9)", "b'x' * (200 << 20)"):
    watch = OomWatch(MemoryCgroup.of_this_process())
    code = subprocess.run([sys.executable, "-c", f"import os; {what}"]).returncode
    print(code, watch.oom_killed())
print(watch.describe())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, preexec_fn=cgroup.enter
    )
    assert done.stdout.splitlines()[:2] == ["-9 False", "-9 True"], done.stderr
    assert "the limit of all processes together is 0.06 GiB" in done.stdout
