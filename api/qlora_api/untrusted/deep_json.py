"""Parse JSON of any depth that an API server takes: whoever may create objects decides on what is read by others.

metadata.managedFields may be nested 9,000 levels deep; Python's own parser ends at its recursion limit, near 1,000.
"""

from __future__ import annotations

import json
import sys
from typing import Any

DEEPEST = 10_000
"""Levels of JSON that the API server itself takes (encoding/json of Go)."""
_FRAMES = 1000
"""For the caller, of the limit that Python counts both against."""


def parse_json(text: bytes | str) -> Any:
    """Parse JSON, nested as deep as the API server takes it.

    Raises:
        ValueError: it is no JSON, or deeper.

    """
    try:
        return json.loads(text)
    except RecursionError:
        pass
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, DEEPEST + _FRAMES))
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"JSON of more than {DEEPEST} levels") from None
    finally:
        sys.setrecursionlimit(before)
