from __future__ import annotations

import pytest

from qlora_api.untrusted.printable import is_printable, printable
from services.hostile_rank import TERMINAL


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("step 3 of 10\n\tloss 0.5 – ok ✓ 東京 עברית", "step 3 of 10\n\tloss 0.5 – ok ✓ 東京 עברית"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b[38:2::1:2:3mred", "red"),
        ("\x1b]8;;http://x\x07link", "\ufffd]8;;http://x\ufffdlink"),
        ("\x1b[2J", "\ufffd[2J"),
        ("\x9b2J", "\ufffd2J"),
        ("a\u202eb\u2066c", "a\ufffdb\ufffdc"),
        ("a\u200bb\ufeffc", "a\ufffdb\ufffdc"),
        ("a\ud800b", "a\ufffdb"),
        ("tag\U000e0041", "tag\ufffd"),
    ],
)
def test_what_controls_a_terminal_is_replaced_and_the_rest_kept(text, shown):
    assert printable(text) == shown
    assert is_printable(shown)


def test_a_text_with_all_kinds_is_not_printable_until_it_is_made_so():
    assert not is_printable(TERMINAL)
    assert is_printable(printable(TERMINAL))
