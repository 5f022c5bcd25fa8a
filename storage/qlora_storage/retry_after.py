"""Ask a busy object store for how long it wants to be left alone: obstore does not pass its answer's headers on."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request

BUSY = (429, 503)
ASK_SECONDS = 5.0
MOST_SECONDS = 120.0
"""A server that asks for longer is tried again nevertheless."""


def requested_wait(signed_url: str, certificate: bytes | None) -> float | None:
    """Send one request without a body, and return the seconds of its Retry-After.

    Args:
        signed_url: of an object, for HEAD.
        certificate: authorities that are trusted beside the system's, PEM.

    Returns:
        None where the server is not busy any more, says nothing or does not answer.

    """
    context = ssl.create_default_context(cadata=certificate.decode() if certificate else None)
    request = urllib.request.Request(signed_url, method="HEAD")  # noqa: S310 made from a checked endpoint
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS, context=context):  # noqa: S310
            return None
    except urllib.error.HTTPError as error:
        seconds = error.headers.get("Retry-After", "") if error.code in BUSY else ""
        error.close()
    except (OSError, ValueError):
        return None
    return min(float(seconds), MOST_SECONDS) if seconds.isdecimal() else None
