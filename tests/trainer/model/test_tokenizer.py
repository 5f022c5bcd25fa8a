"""Calls of a tokenizer in a container with little memory, and panics of its library."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qlora_trainer.errors import UserError
from qlora_trainer.model.tokenizer import BoundedTokenizer, Bounds

TAKES_MUCH = """
from qlora_trainer.errors import UserError
from qlora_trainer.model.tokenizer import Bounds, BoundedTokenizer
try:
    BoundedTokenizer(lambda size: b"x" * size, Bounds())(3 << 30)
except UserError as error:
    print(error)
"""


def test_a_tokenizer_fails_before_the_kernel_kills_its_process(limited_memory):
    """The bound without a limit, 8 GiB, is more than a container may have."""
    command = [sys.executable, "-c", TAKES_MUCH]
    enter = limited_memory(2 << 30).enter
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=enter)
    assert done.returncode == 0, done.stderr
    assert "has a tokenizer that takes too much memory for some rows" in done.stdout


class PanicException(BaseException):
    """As PyO3 names it."""


def test_a_panic_is_told_without_the_text():
    def panic(text):
        raise PanicException(f"panicked at src/{text}.rs:12:5: byte index 1 is not a char boundary of `{text}`")

    with pytest.raises(UserError) as caught:
        BoundedTokenizer(panic, Bounds())("Zebra")
    assert str(caught.value) == "spec.model.source: has a tokenizer whose library fails on a text"
