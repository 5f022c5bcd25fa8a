"""Decision records have a status, a date and the parts that a reader looks for, and the index lists each of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "decisions"
PARTS = ["Status", "Context", "Decision", "Alternatives", "Consequences"]
RECORDS = sorted(FOLDER.glob("[0-9]*.md"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_a_record_has_status_date_and_all_its_parts_in_order(record):
    text = record.read_text()
    found = [part for part in re.findall(r"^\*\*(\w+)[^*]*\.\*\*", text, re.MULTILINE) if part in PARTS]
    assert found == PARTS
    assert re.search(
        r"^\*\*Status\.\*\* (Accepted|Superseded by \[\d+\]\([\w.-]+\)), \d{4}-\d\d-\d\d\.$", text, re.MULTILINE
    )


def test_the_index_lists_each_record_by_its_title():
    index = (FOLDER / "index.md").read_text()
    titles = {path.name: path.read_text().splitlines()[0].removeprefix("# ") for path in RECORDS}
    assert {name: title for title, name in re.findall(r"\[(\d+\. [^\]]+)\]\(([\w.-]+)\)", index)} == titles
