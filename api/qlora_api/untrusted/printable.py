"""Find the characters that could control a terminal: escape sequences, direction of writing, invisible text.

Whoever runs a pod or names an object decides on what is shown to others. These characters have no use in a message.
"""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-9;:]*m")
"""Selects colours and weights (ECMA-48, 8.3.117), as logs do: taken out, the rest is readable."""
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # direction of writing (UAX #9), line and paragraph separators
    # Invisible (Default_Ignorable_Code_Point, UAX #44), but for what scripts and emoji need: joiners and U+FE00-FE0F.
    "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u2060-\u2065\u206a-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\ud800-\udfff\U000e0000-\U000e0fff]"  # and lone surrogates
)
REPLACEMENT = "\ufffd"


def printable(text: str) -> str:
    """Return a text in which every character that could control a terminal is the replacement character."""
    return UNSAFE.sub(REPLACEMENT, _COLOURS.sub("", text))


def is_printable(text: str) -> bool:
    """Return whether no character of a text could control a terminal."""
    return UNSAFE.search(text) is None
