"""Settings of object storage in the environment: cleaned, checked by name, and turned into obstore's options.

Values come from Secrets that people make by hand: with a line break at the end, empty, or an endpoint without a scheme.
obstore panics on several of these, so nothing reaches it that is not checked here.
"""

from __future__ import annotations

import json
import re
from configparser import Error as ConfigParserError
from configparser import RawConfigParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, assert_never
from urllib.parse import urlsplit

from qlora_api.environment import WORKLOAD_IDENTITY
from qlora_storage.local_paths import expand_home

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from qlora_storage.backend import BucketScheme

PREFIXES = ("AWS_", "GOOGLE_", "AZURE_", "HF_")
MANY_LINES = ("GOOGLE_SERVICE_ACCOUNT_KEY",)
"""JSON, which may be written on several lines."""
AWS_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
ENDPOINTS = (*AWS_ENDPOINTS, "AZURE_STORAGE_ENDPOINT")
"""Variables that name an endpoint of object storage itself."""
_URLS = (
    *ENDPOINTS,
    "AWS_STS_ENDPOINT",
    "AWS_METADATA_ENDPOINT",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AZURE_ENDPOINT",
    "AZURE_AUTHORITY_HOST",
    "AZURE_STORAGE_AUTHORITY_HOST",
    "AZURE_MSI_ENDPOINT",
    "AZURE_IDENTITY_ENDPOINT",
    "GOOGLE_BASE_URL",
    "HF_ENDPOINT",
)
_URL = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~%/-]*)?")
PLAIN_URL = "without a user, a password or a query"
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_REGION = re.compile(r"[A-Za-z0-9-]+")
_ACCOUNT = re.compile(r"[A-Za-z0-9-]+")
"""A name in Azure's URLs; with a slash it would name another server."""
_QUOTED = re.compile(r"""(["']).*\1""", re.DOTALL)
_PLACEHOLDER = re.compile(r"none|null|nil|undefined|\$\([^)]*\)|\$\{[^}]*\}|\{\{.*\}\}|<.*>", re.IGNORECASE)
"""Text that scripts and templates leave in place of a missing value."""
_SCHEME = re.compile(r"(bearer|token|basic)\s", re.IGNORECASE)
"""Scheme of an Authorization header, which is added here."""
_SWITCHES = (
    "AWS_ALLOW_HTTP",
    "AWS_DISABLE_BULK_DELETE",
    "AWS_DISABLE_TAGGING",
    "AWS_IMDSV1_FALLBACK",
    "AWS_S3_EXPRESS",
    "AWS_SKIP_SIGNATURE",
    "AWS_SSE_BUCKET_KEY_ENABLED",
    "AWS_UNSIGNED_PAYLOAD",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AZURE_ALLOW_HTTP",
    "AZURE_DISABLE_TAGGING",
    "AZURE_SKIP_SIGNATURE",
    "AZURE_STORAGE_USE_EMULATOR",
    "AZURE_USE_AZURE_CLI",
    "AZURE_USE_FABRIC_ENDPOINT",
    "GOOGLE_ALLOW_HTTP",
    "GOOGLE_SKIP_SIGNATURE",
)
_ON = ("1", "true", "on", "yes", "y")
_OFF = ("0", "false", "off", "no", "n")
_TEMPORARY_KEY = "ASIA"
"""Access keys of AWS that begin so count only with a session token."""

AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
GOOGLE_KEY = "GOOGLE_SERVICE_ACCOUNT_KEY"
"""JSON, which may name a server of its own."""
GOOGLE_KEYS = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_BEARER_TOKEN",
)
"""Credentials besides that one."""
_GOOGLE_FILE = Path(".config", "gcloud", "application_default_credentials.json")
AZURE_KEYS = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_MASTER_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
)
_AZURE_SIGNERS = (*AZURE_KEYS, "AZURE_USE_AZURE_CLI", "AZURE_STORAGE_USE_EMULATOR")
_AZURE_UNREAD = {
    "AZURE_STORAGE_CONNECTION_STRING": (
        "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, its AccountName and AccountKey"
    ),
    "AZURE_STORAGE_KEY": "AZURE_STORAGE_ACCOUNT_KEY",
}
"""Credentials of Azure's own tools that obstore does not read, and the variables to set instead."""
AWS_BUCKET_IN_ENDPOINT = "AWS_VIRTUAL_HOSTED_STYLE_REQUEST"
"""Setting with which the endpoint is the bucket's own."""
AZURE_POD_TOKEN = "AZURE_FEDERATED_TOKEN_FILE"  # noqa: S105 a variable's name
"""obstore would take it before a SAS token."""


class SettingError(ValueError):
    """A variable of the environment, or a setting in a file that it names, cannot be used."""


@dataclass(frozen=True)
class StoreSettings:
    """Settings to reach buckets of one scheme."""

    config: dict[str, str | bool] = field(default_factory=dict)
    """Configuration of obstore's store, beside what obstore reads from the environment itself."""
    allow_http: bool = False
    certificate: bytes | None = None
    """Authorities that are trusted, PEM."""
    anonymous: bool = False
    """No credentials are there, and requests are not signed."""


def clean_environment(environ: MutableMapping[str, str]) -> None:
    """Take blanks and line breaks off both ends of values, and forget variables that are empty, in place.

    A token of the pod's own identity is forgotten too, where that identity does not count.
    """
    if not is_on(environ, WORKLOAD_IDENTITY):
        environ.pop(AZURE_POD_TOKEN, None)
    for name in [name for name in environ if name.startswith(PREFIXES)]:
        value = environ[name].strip()
        if not value:
            del environ[name]
        elif value != environ[name]:
            environ[name] = value


def read_settings(scheme: BucketScheme, environ: Mapping[str, str], home: Path) -> StoreSettings:
    """Read how buckets of ``scheme`` are reached from a cleaned environment, and from the files it names.

    Args:
        scheme: of their URIs.
        environ: of the process, cleaned.
        home: folder of the user, for ``.aws`` and ``.config/gcloud``.

    Raises:
        SettingError: names the variable that cannot be used.
        OSError: a file that is named cannot be read.

    """
    check_variables(environ)
    identity = is_on(environ, WORKLOAD_IDENTITY)
    match scheme:
        case "s3":
            return _read_s3(environ, home, identity=identity)
        case "gs":
            return _read_google(environ, home, identity=identity)
        case "az":
            return _read_azure(environ, identity=identity)
        case _:
            assert_never(scheme)


def check_variables(environ: Mapping[str, str]) -> None:
    """Refuse what cannot be meant.

    Raises:
        SettingError: names the variable and what it must be. No value is repeated: errors end in a job's status, and
            values may be secret, as a password in a URL or a key in the wrong variable.

    """
    for name in sorted(environ):
        value = environ[name]
        if not name.startswith(PREFIXES):
            continue
        if name not in MANY_LINES and not value.isprintable():
            raise SettingError(f"{name}: has a line break or another control character inside")
        if not name.endswith("_PROFILE") and _PLACEHOLDER.fullmatch(value):
            raise SettingError(f"{name}: has a placeholder that was not replaced, such as None or $(NAME)")
        if name != "AWS_CONTAINER_AUTHORIZATION_TOKEN" and _SCHEME.match(value):  # that one is the whole header
            raise SettingError(f"{name}: must be the token alone, without the word before it")
        if _QUOTED.fullmatch(value):
            raise SettingError(f"{name}: has quotation marks around it, which would be part of the value")
        if name in _URLS and not is_url(value):
            raise SettingError(f"{name}: must be a URL such as https://host or http://host:9000, {PLAIN_URL}")
        if name in _REGIONS and not _REGION.fullmatch(value):
            raise SettingError(f"{name}: must be a region such as us-east-1")
        if name == "AZURE_STORAGE_ACCOUNT_NAME" and not _ACCOUNT.fullmatch(value):
            raise SettingError(f"{name}: must be the name of a storage account, of letters and digits")
        if name in _SWITCHES and value.lower() not in (*_ON, *_OFF):
            raise SettingError(f"{name}: must be true or false")


def store_urls(scheme: BucketScheme, environ: Mapping[str, str], settings: StoreSettings) -> dict[str, str]:
    """Return the servers of a scheme's stores that the environment names, under the variables that name them.

    Raises:
        SettingError: the service account's key names one, and not by a URL.

    """
    prefix = _prefix(scheme)
    names = (*ENDPOINTS, "AZURE_ENDPOINT", "GOOGLE_BASE_URL")
    urls = {name: environ[name] for name in names if name.startswith(prefix) and name in environ}
    if "endpoint" in settings.config:
        urls["endpoint_url of the AWS profile"] = str(settings.config["endpoint"])
    if scheme == "gs" and (key := environ.get("GOOGLE_SERVICE_ACCOUNT_KEY")):
        try:
            named = json.loads(key).get("gcs_base_url")
        except (ValueError, AttributeError, RecursionError):
            named = None  # obstore says what is wrong with it
        if named is not None:
            if not isinstance(named, str) or not is_url(named):
                raise SettingError(f"GOOGLE_SERVICE_ACCOUNT_KEY: its gcs_base_url must be a URL, {PLAIN_URL}")
            urls["gcs_base_url of GOOGLE_SERVICE_ACCOUNT_KEY"] = named
    return urls


def _prefix(scheme: BucketScheme) -> str:
    match scheme:
        case "s3":
            return "AWS_"
        case "gs":
            return "GOOGLE_"
        case "az":
            return "AZURE_"
        case _:
            assert_never(scheme)


def is_url(value: str) -> bool:
    """Tell whether a value is the URL of a server."""
    found = _URL.fullmatch(value)
    return found is not None and int((found[2] or ":1")[1:]) < 1 << 16


def names_bucket(url: str, bucket: str) -> bool:
    """Tell whether a server's URL has a bucket in it, which would be named twice: the store adds its own.

    A path of one name is a bucket's; a longer one may be where a server has its S3 interface.
    """
    server = urlsplit(url)
    path, host = server.path.strip("/"), server.hostname or ""
    in_path = bool(path) and path.rpartition("/")[2] in (path, bucket)
    return in_path or host.startswith(f"{bucket}.s3")


def is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").strip().lower() in _ON


# ---------------------------------------------------------------------------------------------------------------- AWS


def _read_s3(environ: Mapping[str, str], home: Path, *, identity: bool) -> StoreSettings:
    given = [name for name in AWS_KEYS if name in environ]
    profile = _read_profile(environ, home, required=not given)
    config: dict[str, str | bool] = {}
    if len(given) == 1:
        missing = next(name for name in AWS_KEYS if name not in environ)
        raise SettingError(f"{missing}: is missing or empty, and {given[0]} is set: both are needed")
    if given:
        _check_token(environ["AWS_ACCESS_KEY_ID"], environ.get("AWS_SESSION_TOKEN") or environ.get("AWS_TOKEN"))
    elif keys := _profile_keys(profile):
        config |= keys
    if not any(name in environ for name in _REGIONS) and "region" in profile:
        if not _REGION.fullmatch(profile["region"]):
            raise SettingError("region of the AWS profile: must be a region such as us-east-1")
        config["region"] = profile["region"]
    if not any(name in environ for name in ENDPOINTS) and "endpoint_url" in profile:
        if not is_url(profile["endpoint_url"]):
            raise SettingError(f"endpoint_url of the AWS profile: must be a URL, {PLAIN_URL}")
        config["endpoint"] = profile["endpoint_url"]
    signed = bool(given) or "access_key_id" in config or identity
    bundle = environ.get("AWS_CA_BUNDLE") or profile.get("ca_bundle")
    return StoreSettings(
        config=config if signed else {**config, "skip_signature": True},
        allow_http=is_on(environ, "AWS_ALLOW_HTTP"),
        certificate=Path(bundle).read_bytes() if bundle else None,
        anonymous=not signed,
    )


def _read_profile(environ: Mapping[str, str], home: Path, *, required: bool) -> dict[str, str]:
    """Read the profile that ``AWS_PROFILE`` names of the files that AWS's own tools read."""
    name = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or "default"
    places = {
        environ.get("AWS_CONFIG_FILE") or str(home / ".aws" / "config"): (f"profile {name}", name),
        environ.get("AWS_SHARED_CREDENTIALS_FILE") or str(home / ".aws" / "credentials"): (name,),
    }
    found: dict[str, str] = {}
    there = False
    for place, sections in places.items():
        parser = RawConfigParser(default_section="")
        try:
            parser.read(expand_home(place), encoding="utf-8")
        except (ConfigParserError, UnicodeDecodeError) as error:
            raise SettingError(f"{place}: cannot be read: {str(error).partition(chr(10))[0]}") from error
        for section in filter(parser.has_section, sections):
            there = True
            found |= {key: value for key, value in parser.items(section) if value}
    if required and not there and name != "default":
        raise SettingError(f'AWS_PROFILE: "{name}" is in none of {", ".join(places)}')
    return found


def _profile_keys(profile: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of a profile; none where it has none."""
    key, secret = profile.get("aws_access_key_id"), profile.get("aws_secret_access_key")
    token = profile.get("aws_session_token")
    if key and secret:
        if not all(value.isprintable() for value in (key, secret, token or "")):
            raise SettingError("the AWS profile: a key has a control character inside")
        _check_token(key, token)
        return {"access_key_id": key, "secret_access_key": secret} | ({"session_token": token} if token else {})
    for signs_in in ("sso_session", "sso_start_url", "credential_process", "role_arn", "source_profile"):
        if signs_in in profile:
            raise SettingError(
                f"AWS_PROFILE: the profile signs in by {signs_in}, which is not read here; put its keys into the "
                'environment: eval "$(aws configure export-credentials --format env)"'
            )
    return {}


def _check_token(key: str, token: str | None) -> None:
    if key.startswith(_TEMPORARY_KEY) and not token:
        raise SettingError(
            f"AWS_SESSION_TOKEN: is missing or empty, and the access key is a temporary one ({_TEMPORARY_KEY}…), "
            "which counts with its token alone"
        )


# --------------------------------------------------------------------------------------------------- Google and Azure


def _read_google(environ: Mapping[str, str], home: Path, *, identity: bool) -> StoreSettings:
    signed = any(name in environ for name in (GOOGLE_KEY, *GOOGLE_KEYS)) or (home / _GOOGLE_FILE).is_file() or identity
    return StoreSettings(
        config={} if signed else {"skip_signature": True},
        allow_http=is_on(environ, "GOOGLE_ALLOW_HTTP"),
        anonymous=not signed,
    )


def _read_azure(environ: Mapping[str, str], *, identity: bool) -> StoreSettings:
    signed = any(name in environ for name in _AZURE_SIGNERS) or identity
    if not signed and (unread := next((name for name in _AZURE_UNREAD if name in environ), None)):
        raise SettingError(f"{unread}: is not read here; set {_AZURE_UNREAD[unread]}")
    return StoreSettings(
        config={} if signed else {"skip_signature": True},
        allow_http=is_on(environ, "AZURE_ALLOW_HTTP"),
        anonymous=not signed,
    )
