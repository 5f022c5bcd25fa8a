"""Write texts of strangers (messages of pods, names, rows, logs) without what could control a terminal."""

from __future__ import annotations

import sys
from typing import Any

from qlora_api.untrusted.printable import REPLACEMENT, UNSAFE, printable


def write(text: str, *, error: bool = False) -> None:
    """Write a text to standard output, or standard error, and flush it."""
    stream = sys.stderr if error else sys.stdout
    stream.write(printable(text))
    stream.flush()


def write_line(text: object, *, error: bool = False) -> None:
    """Write a text and the end of its line."""
    write(f"{text}\n", error=error)


def one_line(text: str) -> str:
    """Return a name, such as that of a folder, in which no character ends the line: what follows would be another."""
    return text.replace("\n", REPLACEMENT).replace("\r", REPLACEMENT)


def is_encodable(text: str) -> bool:
    """Return whether the encoding of standard output has all characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def as_json(value: Any, indent: int | None = 2) -> str:
    """Return JSON in which such characters are escaped, and those that standard output lacks, so that values stay."""
    import json  # noqa: PLC0415 not for --help

    text = json.dumps(value, indent=indent, ensure_ascii=False)
    text = text if is_encodable(text) else json.dumps(value, indent=indent)
    return UNSAFE.sub(lambda found: _escaped(ord(found[0])), text)


def _escaped(code: int) -> str:
    """Return a character as JSON may have it: beyond the 16 bits of an escape, as two (RFC 8259, section 7)."""
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
