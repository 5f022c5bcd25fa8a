"""Meaning of an answer of object storage: of obstore's error, the HTTP status, and the server's code and text."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from obstore.exceptions import AlreadyExistsError, PreconditionError

from qlora_storage.backend import Fault, FaultKind
from qlora_storage.store_settings import SettingError

_STATUS = re.compile(r"status code: (\d{3})")
_BUCKET_CODES = ("NoSuchBucket", "ContainerNotFound")
_OBJECT_CODES = ("", "NoSuchKey", "BlobNotFound")
_CREDENTIAL_SERVICES = ("/latest/api/token", "/latest/meta-data/iam", "/computeMetadata/", "/metadata/identity/")
"""Paths at which machines of the clouds get credentials: asked last, if the environment has none."""
_TRANSIENT_CODES = (
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "NoSuchUpload",  # ended by a call whose answer was lost: the object is sent anew
    "OperationAborted",
    "OperationTimedOut",
    "RequestTimeout",
    "ServerBusy",
    "ServiceUnavailable",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
)
"""Go away by themselves, whatever the status: S3 sends several with 400, 403 and 409."""
_OTHER_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_TIMED_OUT = "kind: Timeout"
_REDIRECT = "redirect without LOCATION"
_CLOCK = ("RequestTimeTooSkewed", "RequestExpired")
_TRANSIENT_STATUSES = (408, 409, 425, 429)
_MISSING_FEATURE = 501


class PanickedError(Exception):
    """obstore panicked: it was given something that it does not check."""


def bucket_fault(error: Exception) -> Fault:
    """Tell what obstore's error means."""
    if isinstance(error, SettingError):
        return Fault(FaultKind.USER, str(error))
    if isinstance(error, PanickedError):
        return Fault(FaultKind.USER, f"obstore cannot work with these settings ({error})")
    text = str(error)
    status = int(m[1]) if (m := _STATUS.search(text)) else 0
    code = _tag(text, "Code")
    message = _message(text, status, code)
    if any(path in text for path in _CREDENTIAL_SERVICES):
        return Fault(
            FaultKind.USER, f"no credentials were found, and the machine's metadata service has none ({message})"
        )
    if "builder error" in text:
        return Fault(FaultKind.USER, "the endpoint is not https; set AWS_ALLOW_HTTP=true if that is meant")
    if "certificate" in text and not status:
        return Fault(FaultKind.USER, f"the server's certificate is not trusted; AWS_CA_BUNDLE names more ({message})")
    kind, meaning = _meaning(error, text, status, code)
    return Fault(
        kind,
        f"{meaning} ({message})" if meaning else message,
        status=status,
        denied=meaning == _DENIED,
        timed_out=_TIMED_OUT in text,
    )


_DENIED = "access is denied"


def _meaning(error: Exception, text: str, status: int, code: str) -> tuple[FaultKind, str]:
    """Return the kind, and an explanation to put before the server's message."""
    if code in _CLOCK:
        return FaultKind.TRANSIENT, _clock(text)
    if code in _TRANSIENT_CODES:
        return FaultKind.TRANSIENT, ""
    if code in _OTHER_REGION or status in (301, 307) or _REDIRECT in text:
        region = _tag(text, "Region")
        where = f" ({region})" if re.fullmatch(r"[a-z0-9-]{1,32}", region) else ""
        return FaultKind.USER, f"the bucket is in another region{where} than AWS_REGION says"
    if code in _BUCKET_CODES:
        return FaultKind.USER, "there is no such bucket"
    if isinstance(error, FileNotFoundError) and code in _OBJECT_CODES:
        return FaultKind.MISSING, ""
    if isinstance(error, AlreadyExistsError):
        return FaultKind.EXISTS, ""
    if isinstance(error, PreconditionError):
        return FaultKind.FINAL, "the object changed while it was read"
    if status in (401, 403, 404):
        return FaultKind.USER, _DENIED
    if status == _MISSING_FEATURE:
        return FaultKind.USER, "the server lacks a feature that is needed, such as conditional writes (If-None-Match)"
    if 300 <= status < 500 and status not in _TRANSIENT_STATUSES:
        return FaultKind.USER, "the server refuses the request"
    return FaultKind.TRANSIENT, "no answer came in time" if _TIMED_OUT in text else ""


def _clock(text: str) -> str:
    """Say how far this machine's clock is from the server's, where the answer has both times."""
    try:
        server = datetime.fromisoformat(_tag(text, "ServerTime"))
        seconds = (_request_time(_tag(text, "RequestTime")) - server).total_seconds()
    except ValueError:
        return "the clock of this machine and the server's differ by too much: set it, by NTP"
    side = "ahead of" if seconds > 0 else "behind"
    return f"the clock of this machine is {abs(seconds) / 60:.1f} minutes {side} the server's: set it, by NTP"


def _request_time(text: str) -> datetime:
    if re.fullmatch(r"\d{8}T\d{6}Z", text):
        return datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return datetime.fromisoformat(text)


def _message(text: str, status: int, code: str) -> str:
    """Cut out the part of obstore's page-long text that says something."""
    if status:
        message = _tag(text, "Message")
        return f"{status} {code}: {message}" if message else f"{status} {code}".strip()
    return text.partition("\n")[0][:300]


def _tag(text: str, name: str) -> str:
    found = re.search(rf"<{name}>([^<]*)</{name}>", text)
    return found[1] if found else ""
