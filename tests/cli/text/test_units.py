"""Numbers as people read them."""

import pytest

from qlora_cli.text import units


@pytest.mark.parametrize(
    ("count", "text"),
    [(8_030_000_000, "8.03 billion"), (494_000_000, "0.49 billion"), (4_262_144, "4.26 million")],
)
def test_large_numbers_have_a_unit_in_which_they_are_not_zero(count, text):
    assert units.large_number(count) == text
