"""For all tests of the trainer."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from services.fixtures import skip_unless_ci
from services.limits import memory_limit


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
