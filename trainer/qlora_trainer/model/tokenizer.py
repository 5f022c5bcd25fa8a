"""The tokenizer, with the job's chat template in place, within bounds of time and memory."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_trainer.errors import UserError
from qlora_trainer.liveness.cgroup import MemoryCgroup

FIELD = "spec.model.source"
RESERVE_BYTES = 512 << 20
"""Of what the container may have, for everything else that grows during a call."""
LEAST_BYTES = 512 << 20
"""Given to a call in any case: its threads' stacks count before they are used."""


@dataclass(frozen=True)
class Bounds:
    """Limits of one call of a tokenizer; the system ends a process that takes more."""

    seconds: float = 300.0
    """Of processor time, of all threads. A batch of rows of a MiB takes seconds, the largest row a minute."""
    memory_bytes: int = 8 << 30
    """Beyond what the process has, and no more than its container has left. A tokenizer takes a hundred times the
    text's size; a row has 16 MiB at most."""


class BoundedTokenizer:
    """A tokenizer whose calls are within bounds, and whose panics are errors of the base."""

    def __init__(self, tokenizer: Any, bounds: Bounds) -> None:
        self._tokenizer = tokenizer
        self._bounds = bounds

    def __call__(self, *texts: Any, **options: Any) -> Any:
        with bounded(self._bounds), _errors_of_the_base():
            return self._tokenizer(*texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)


def load_tokenizer(path: Path, chat_template: str | None = None) -> Any:
    """Return the base model's tokenizer; a chat template of the job's own replaces the tokenizer's.

    Raises:
        UserError: transformers cannot make a tokenizer of these files.

    """
    try:
        with _errors_of_the_base():
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # each kind of tokenizer checks its files in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise UserError(FIELD, None, f"has a tokenizer that cannot be loaded: {reason}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_bounded_tokenizer(path: Path, chat_template: str | None = None, bounds: Bounds | None = None) -> Any:
    """:func:`load_tokenizer`, for a process that may be ended: loading and every call are within bounds."""
    bounds = bounds or Bounds()
    with bounded(bounds):
        tokenizer = load_tokenizer(path, chat_template)
    return BoundedTokenizer(tokenizer, bounds)


@contextmanager
def bounded(bounds: Bounds) -> Iterator[None]:
    """End this process, by SIGPROF or by the abort that a failed allocation is, if what is within takes more."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    most = _data_bytes() + _allowed_bytes(bounds.memory_bytes)
    soft = most if before[0] == resource.RLIM_INFINITY else min(most, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    signal.setitimer(signal.ITIMER_PROF, bounds.seconds)  # nothing handles its signal
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _allowed_bytes(most: int) -> int:
    """Return what a call may take, so that it fails before the kernel kills the process, which tells nothing."""
    cgroup = MemoryCgroup.of_this_process()
    available = cgroup.available_bytes() if cgroup else None
    return most if available is None else min(most, max(available - RESERVE_BYTES, LEAST_BYTES))


def _data_bytes() -> int:
    """Private memory of this process, as RLIMIT_DATA counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))


@contextmanager
def _errors_of_the_base() -> Iterator[None]:
    """Turn a panic of the tokenizers' Rust, whose class is in no module and no Exception, into an error of the base.

    Raises:
        UserError: there was one, such as that of an expression that takes exponential time.

    """
    try:
        yield
    except MemoryError:
        raise UserError(
            FIELD, None, "has a tokenizer that takes too much memory for some rows, or to be loaded"
        ) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(FIELD, None, "has a tokenizer whose library fails on a text") from None  # which it may quote
