"""Read what somebody else wrote in pieces, and no more than fits.

Whoever may create objects decides on what an API server sends to all its watchers. An object of 1.5 MB, the most that
etcd takes, is 9 MB of JSON where each character is written in six bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp

LARGEST_BYTES = 2**24
"""Largest answer for one object, or for one page of a list."""


class TooLargeError(Exception):
    """An answer has more bytes than it may have."""


async def read_within(content: aiohttp.StreamReader, largest: int = LARGEST_BYTES) -> bytes:
    """Read everything.

    Raises:
        TooLargeError: there is more than ``largest`` bytes of it.

    """
    text = bytearray()
    async for piece in content.iter_any():
        text += piece
        if len(text) > largest:
            raise TooLargeError(f"an answer of more than {largest} bytes")
    return bytes(text)


async def lines(content: aiohttp.StreamReader, largest: int = LARGEST_BYTES) -> AsyncIterator[bytes | None]:
    """Give each whole line; None in the place of one that has more than ``largest`` bytes."""
    buffer, too_large = bytearray(), False
    async for piece in content.iter_any():
        for number, part in enumerate(piece.split(b"\n")):
            if number:  # a line ends before it
                if buffer or too_large:
                    yield None if too_large else bytes(buffer)
                buffer.clear()
                too_large = False
            too_large = too_large or len(buffer) + len(part) > largest
            if too_large:
                buffer.clear()
            else:
                buffer += part
