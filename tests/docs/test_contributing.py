"""The files and names in CONTRIBUTING, under "Where to change what", exist."""

from __future__ import annotations

import re

import pytest

from docs.blocks import REPOSITORY

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
SECTION = TEXT.partition("## Where to change what")[2]
LINK = re.compile(r"\]\((?P<target>[^):#]+)\)")
NAMED = re.compile(
    r"(?P<names>(?:`\w+`(?:,\s|\sand\s)?)+)(?:\sand the \w+)?\sin\s+(?:the )?\[[^\]]+\]\((?P<target>[^)]+)\)"
)


@pytest.mark.parametrize("target", sorted(set(LINK.findall(TEXT))))
def test_every_file_is_there(target):
    assert (REPOSITORY / target).exists()


def test_every_name_is_in_the_file_beside_it():
    named = [(name, m["target"]) for m in NAMED.finditer(SECTION) for name in re.findall(r"`(\w+)`", m["names"])]
    assert len(named) > 30
    absent = [
        f"{name} is not in {target}"
        for name, target in named
        if not re.search(rf"\b{name}\b", (REPOSITORY / target).read_text("utf-8"))
    ]
    assert absent == []
