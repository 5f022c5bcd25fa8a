"""Paths as users write them."""

from pathlib import Path

import pytest

from qlora_storage.local_paths import expand_home


@pytest.mark.parametrize(
    ("written", "expanded"),
    [("~/rows", "/home/me/rows"), ("~nosuchuser/rows", "~nosuchuser/rows"), ("rows/~", "rows/~"), ("", ".")],
)
def test_the_home_of_a_user_is_expanded(monkeypatch, written, expanded):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home(written) == Path(expanded)
