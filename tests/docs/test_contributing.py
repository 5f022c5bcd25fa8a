"""The table of CONTRIBUTING that says where to change what names files and names that are there."""

from __future__ import annotations

import re

import pytest

from docs.blocks import REPOSITORY

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
ROWS = TEXT.partition("## Where to change what")[2]
LINK = re.compile(r"\]\((?P<target>[^):#]+)\)")
NAMED = re.compile(r"(?P<names>(?:`\w+`(?:, | and )?)+)(?: and the \w+)? in (?:the )?\[[^\]]+\]\((?P<target>[^)]+)\)")


@pytest.mark.parametrize("target", sorted(set(LINK.findall(TEXT))))
def test_every_file_is_there(target):
    assert (REPOSITORY / target).exists()


def test_every_name_is_in_the_file_beside_it():
    named = [(name, m["target"]) for m in NAMED.finditer(ROWS) for name in re.findall(r"`(\w+)`", m["names"])]
    assert len(named) > 30
    absent = [
        f"{name} is not in {target}"
        for name, target in named
        if not re.search(rf"\b{name}\b", (REPOSITORY / target).read_text("utf-8"))
    ]
    assert absent == []
