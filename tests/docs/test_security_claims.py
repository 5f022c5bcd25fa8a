"""The security model claims nothing that no test holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "explanation" / "security.md"
NAMED = sorted(set(re.findall(r"`(test_\w+)`", PAGE.read_text())))
DEFINED = {
    name
    for path in (REPOSITORY / "tests").rglob("test_*.py")
    for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
}
CLAIM = re.compile(r"^- .*?(?=^- |^\*|^$|\Z)", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", NAMED)
def test_a_test_that_the_page_names_exists(name):
    assert name in DEFINED


@pytest.mark.parametrize("claim", CLAIM.findall(PAGE.read_text()))
def test_each_claim_names_a_test(claim):
    assert re.search(r"`test_\w+`", claim), claim
