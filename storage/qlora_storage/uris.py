"""Find URIs and paths that would silently name another place than whoever wrote them meant."""

from __future__ import annotations

import re

SCHEMES = ("s3", "gs", "az", "hf", "pvc", "file")
BUCKET = {"s3": r"[A-Za-z0-9._-]+", "gs": r"[A-Za-z0-9._-]+", "az": r"[A-Za-z0-9-]+|\$(root|web|logs)"}
"""Names of buckets, by scheme; those of Azure are containers, some of them the server's own."""
_WITHOUT_SLASHES = re.compile(rf"({'|'.join(SCHEMES)}):|([A-Za-z][A-Za-z0-9+.-]*):(/|$)", re.IGNORECASE)
_VARIABLE = re.compile(r"(^|/)\$[A-Za-z_]|\$[({]")
_QUERY = re.compile(r"\?[\w.-]+=")


def uri_problem(uri: str) -> str | None:
    """Say why a URI or a local path cannot be meant as it is written, and what to write; None where it can.

    The words complete a sentence about the URI and do not repeat it: it may hold a password.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if found := _WITHOUT_SLASHES.match(uri):
            name = found[1] or found[2]
            example = "file:///folder/name" if name.lower() == "file" else f"{name}://name/folder"
            return f"must be written as {example}; a local folder of that name is ./{name}:…"
        rest = uri
    elif scheme == "file" and not rest.startswith("/"):
        return "must have an absolute path after file://, such as file:///folder/name"
    bucket, slash, key = rest.lstrip("/").partition("/")
    if separator and bucket and scheme in BUCKET:
        if not re.fullmatch(BUCKET[scheme], bucket) and not _VARIABLE.search(bucket):
            return (
                f"must have nothing but the name between {scheme}:// and the next slash: credentials and servers"
                " are read from the environment"
            )
        if _QUERY.search(key):
            return "must not have a query: versions and options of objects are not read"
        rest = f"{slash}{key}" if bucket.startswith("$") and re.fullmatch(BUCKET[scheme], bucket) else rest
    if _VARIABLE.search(rest):
        return "must not have variables: they are not replaced here; write the value"
    return None


def without_password(uri: str) -> str | None:
    """Return a URI as it may be repeated in an error; None where a password may be in it."""
    return None if "@" in uri.partition("://")[2].partition("/")[0] else uri
