"""Limits of reading rows. A source beyond these is refused with its name."""

from __future__ import annotations

MIB = 1 << 20
GIB = 1 << 30

MOST_ROW_BYTES = 16 * MIB
"""Maximum size of one row as text: several times what the longest ``maxLength`` can hold."""
MOST_EXPANSION = 200
"""Bytes of rows for each byte of a compressed file, beyond the first GiB: text shrinks to a tenth or so."""
ALWAYS_ALLOWED_BYTES = GIB
READER_MEMORY_BYTES = GIB
"""Memory of the process that reads Parquet and Arrow files, in which a file chooses the sizes of its buffers."""
BATCH_ROWS = 512
"""Given to the tokenizer at once: enough for all cores."""
BATCH_BYTES = MIB
"""Ends a batch before it has as many rows: a tokenizer needs a hundred times the text's size and more."""


def most_bytes(file_size: int) -> int:
    """Return the bytes of rows that a file of this size may hold."""
    return max(ALWAYS_ALLOWED_BYTES, MOST_EXPANSION * file_size)


def too_expanded(file_size: int) -> str:
    return (
        f"holds more than {most_bytes(file_size) // MIB} MiB of rows in {file_size} bytes: a file may hold a GiB, or"
        f" {MOST_EXPANSION} times its own size"
    )


def too_large() -> str:
    return f"is larger than {MOST_ROW_BYTES // MIB} MiB, the most that a row may have; write one row on each line"
