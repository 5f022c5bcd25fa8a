"""For all tests of the trainer: builders and workers in ``helpers`` are importable."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from fixtures import skip_unless_ci
from qlora_trainer.liveness import heartbeat
from testing.limits import memory_limit

sys.path.insert(0, str(Path(__file__).with_name("helpers")))

from composites import composites  # noqa: F401 a fixture
from mixtures import mixtures  # noqa: F401 a fixture
from storage_fixtures import job, make_adapter, make_facts, make_model  # noqa: F401 fixtures
from tiny_models import tiny_models  # noqa: F401 a fixture


@pytest.fixture
def limited_memory():
    """Makes cgroups with a real memory limit in bytes."""
    with ExitStack() as made:

        def make(size):
            try:
                return made.enter_context(memory_limit(size))
            except OSError as error:
                skip_unless_ci(f"a cgroup of its own needs root and a writable /sys/fs/cgroup: {error}")

        yield make


@pytest.fixture
def clock(monkeypatch):
    """Return the clock of heartbeats, which stands until its ``value`` is changed."""
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now.value)
    return now
