"""Read the settings of object storage from the environment."""

from __future__ import annotations

import os

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")


def forget_empty_endpoints() -> None:
    """Take an empty endpoint for none: a Secret made of an unset variable has one, and obstore panics on it."""
    for name in ENDPOINTS:
        if os.environ.get(name) == "":
            del os.environ[name]
