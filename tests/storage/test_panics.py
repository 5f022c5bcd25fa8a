"""obstore panics on settings that it does not check, and a panic is no Exception: none may escape."""

import json
import os
import random
import subprocess
import sys

import pytest

from qlora_storage import hub
from qlora_storage.bucket_faults import bucket_fault
from qlora_storage.buckets import _without_panics
from qlora_storage.errors import UserError
from qlora_storage.object_store import open_store
from qlora_storage.store_settings import SettingError, check_variables, clean_environment, read_settings

ENVIRONMENTS = 200
NAMES = {
    "s3": """
        AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION AWS_DEFAULT_REGION AWS_ENDPOINT_URL
        AWS_ENDPOINT AWS_ENDPOINT_URL_S3 AWS_ALLOW_HTTP AWS_METADATA_ENDPOINT AWS_WEB_IDENTITY_TOKEN_FILE AWS_ROLE_ARN
        AWS_CONTAINER_CREDENTIALS_FULL_URI AWS_CONTAINER_CREDENTIALS_RELATIVE_URI AWS_S3_EXPRESS AWS_SKIP_SIGNATURE
        AWS_CONDITIONAL_PUT AWS_CHECKSUM_ALGORITHM AWS_SERVER_SIDE_ENCRYPTION AWS_STS_ENDPOINT AWS_CA_BUNDLE
        AWS_VIRTUAL_HOSTED_STYLE_REQUEST AWS_PROFILE AWS_CONFIG_FILE HTTP_PROXY QLORA_WORKLOAD_IDENTITY
    """,
    "gs": """
        GOOGLE_APPLICATION_CREDENTIALS GOOGLE_SERVICE_ACCOUNT GOOGLE_SERVICE_ACCOUNT_KEY GOOGLE_BASE_URL
        GOOGLE_BEARER_TOKEN GOOGLE_SKIP_SIGNATURE GOOGLE_ALLOW_HTTP QLORA_WORKLOAD_IDENTITY
    """,
    "az": """
        AZURE_STORAGE_ACCOUNT_NAME AZURE_STORAGE_ACCOUNT_KEY AZURE_STORAGE_SAS_TOKEN AZURE_STORAGE_ENDPOINT
        AZURE_STORAGE_TOKEN AZURE_CLIENT_ID AZURE_CLIENT_SECRET AZURE_TENANT_ID AZURE_FEDERATED_TOKEN_FILE
        AZURE_MSI_ENDPOINT AZURE_AUTHORITY_HOST AZURE_STORAGE_USE_EMULATOR AZURE_ALLOW_HTTP QLORA_WORKLOAD_IDENTITY
    """,
}
GOOD = {
    "s3": {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
    "gs": {"GOOGLE_BEARER_TOKEN": "token", "GOOGLE_BASE_URL": "http://127.0.0.1:9"},
    "az": {
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_STORAGE_ACCOUNT_KEY": "a2V5",
        "AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:9",
    },
}
LOCAL = {
    **{f"{cloud}_ALLOW_HTTP": "true" for cloud in ("AWS", "GOOGLE", "AZURE")},
    "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
    "GCE_METADATA_HOST": "127.0.0.1:9",
    "AZURE_MSI_ENDPOINT": "http://127.0.0.1:9",
    "AZURE_AUTHORITY_HOST": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
}
PIECES = (
    *("", " ", "\n", "\t", "\r\n", "\x7f", "\x1b[0m", "é", "日本", "\u2028", "\u200b", "'", '"', "%", "%%%"),
    *(
        "://",
        "http://",
        "https://",
        "http://127.0.0.1:9",
        "http://127.0.0.1:99999",
        "http://[::1]:9",
        "http://[::1",
        "/",
    ),
    *("http://user:pw@127.0.0.1:9", "http://127.0.0.1:9/?a=b#c", "http:///x", "file:///etc/passwd", "ftp://h", "//h"),
    *("127.0.0.1:9", "localhost", "true", "TRUE", "maybe", "etag", "us-east-1", "us east", "/nowhere", "/etc/hostname"),
    *("a2V5", "a2V5=", "{}", "[]", '{"type": "service_account"}', "ASIAX", "x" * 5000, "key", "-----BEGIN"),
)
PROGRAM = """\
import json, os, sys, time
from qlora_storage import buckets
from qlora_storage.errors import JobError
from qlora_storage.object_store import open_store
buckets.PART_RETRIES = 0
kept = dict(os.environ)
for scheme, environment in json.load(sys.stdin):
    os.environ.clear(); os.environ.update(kept | environment)
    ends = []
    for act in (lambda s: s.stat("key"), lambda s: s.put("key", b"1"), lambda s: s.list("folder")):
        try:
            act(open_store(f"{scheme}://bucket/folder", "spec.output.destination", patience_seconds=0))
            ends.append("done")
        except JobError as error:
            ends.append(type(error).__name__)
        except BaseException as error:
            ends.append(f"{type(error).__module__}.{type(error).__name__}: {error}"[:200])
    print(json.dumps(ends), flush=True)
"""


def environments():
    """Generate environments with one to three variables that somebody spoiled; the same ones in each run."""
    rng = random.Random(20)
    for number in range(ENVIRONMENTS):
        scheme = ("s3", "s3", "gs", "az")[number % 4]
        changes = {
            name: "".join(rng.choices(PIECES, k=rng.choice((1, 1, 1, 2))))
            for name in rng.sample(NAMES[scheme], rng.randint(1, 3))
        }
        good = dict(GOOD[scheme])
        if rng.random() < 0.3:
            good.pop(rng.choice(list(good)))
        if rng.random() < 0.2:  # as a Secret of a file's content has it
            good = {name: f"{value}\n" for name, value in good.items()}
        yield scheme, {**LOCAL, **good, **changes}


def test_no_panic_escapes_whatever_the_environment_is(tmp_path):
    cases = list(environments())
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("AWS_", "GOOGLE_", "AZURE_", "HTTP"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(cases),
        env={**clean, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == ENVIRONMENTS
    odd = [
        (case, ends) for case, ends in zip(cases, found, strict=True) if not set(ends) <= {"UserError", "StorageError"}
    ]
    assert odd == []
    assert "panicked" not in done.stderr, "what makes obstore panic is refused before it sees it"


def test_a_panic_that_nobody_foresaw_is_a_users_error_in_words():
    class PanicException(BaseException):
        pass

    with pytest.raises(Exception, match="unwrap") as caught, _without_panics():
        raise PanicException("called `Result::unwrap()`")
    assert "obstore cannot work with these settings" in bucket_fault(caught.value).message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "127.0.0.1:9000"),
        ("AWS_ENDPOINT_URL", "minio.storage.svc"),
        ("AZURE_STORAGE_ENDPOINT", "http://"),
        ("GOOGLE_BASE_URL", "/storage"),
        ("AWS_REGION", "us east"),
        ("AWS_ALLOW_HTTP", "maybe"),
        ("AWS_SECRET_ACCESS_KEY", "two\nlines"),
        ("AWS_SECRET_ACCESS_KEY", '"key"'),
        ("HF_TOKEN", "'token'"),
        ("HF_TOKEN", "Bearer hf_x"),
        ("HF_TOKEN", "None"),
        ("HF_TOKEN", "<your token>"),
        ("AWS_SESSION_TOKEN", "null"),
        ("AWS_SECRET_ACCESS_KEY", "$(SECRET)"),
        ("AWS_ACCESS_KEY_ID", "${AWS_ACCESS_KEY_ID}"),
        ("AZURE_STORAGE_ACCOUNT_KEY", "{{ .Values.key }}"),
        ("GOOGLE_SERVICE_ACCOUNT_KEY", '"{\n}"'),
        ("AZURE_STORAGE_ACCOUNT_NAME", "server.example/account"),
        ("AZURE_STORAGE_ACCOUNT_NAME", "account@server.example"),
        ("AZURE_STORAGE_ACCOUNT_NAME", "169.254.169.254/?"),
        ("AZURE_STORAGE_ACCOUNT_NAME", "server.example:80#"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(name, value):
    with pytest.raises(SettingError, match=f"^{name}: "):
        check_variables({name: value})


@pytest.mark.parametrize("name", ["AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY"])
def test_credentials_of_azures_tools_that_are_not_read_are_named_with_those_that_are(tmp_path, name):
    given = {"AZURE_STORAGE_ACCOUNT_NAME": "account", name: "hunter2"}
    with pytest.raises(SettingError, match=f"^{name}: is not read here; set .*AZURE_STORAGE_ACCOUNT_KEY") as refused:
        read_settings("az", given, tmp_path)
    assert "hunter2" not in str(refused.value)
    assert not read_settings("az", {**given, "AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}, tmp_path).anonymous


def test_a_token_that_is_a_whole_header_is_taken():
    check_variables({"AWS_CONTAINER_AUTHORIZATION_TOKEN": "Basic YWJj"})


def test_secrets_are_not_repeated():
    with pytest.raises(SettingError) as refused:
        check_variables({"AWS_SECRET_ACCESS_KEY": "top\nsecret"})
    assert "secret" not in str(refused.value).removeprefix("AWS_SECRET_ACCESS_KEY").lower()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "https://user:hunter2@minio.storage.svc"),
        ("AZURE_STORAGE_ENDPOINT", "https://account.blob.core.windows.net/?sig=hunter2"),
        ("AWS_REGION", "hunter2/Xb+9"),
        ("AWS_ALLOW_HTTP", "hunter2"),
    ],
)
def test_no_value_is_in_an_error_since_it_may_be_a_secret(name, value):
    with pytest.raises(SettingError, match=f"^{name}: must be ") as refused:
        check_variables({name: value})
    assert "hunter2" not in str(refused.value)


def test_the_endpoint_of_a_profile_is_not_repeated_either(tmp_path):
    (tmp_path / "config").write_text("[default]\nendpoint_url = https://user:hunter2@minio\n")
    with pytest.raises(SettingError, match="endpoint_url of the AWS profile: must be a URL") as refused:
        read_settings("s3", {"AWS_CONFIG_FILE": str(tmp_path / "config")}, tmp_path)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("region", ["us east", "eu-west-1.server.example/", "x@server.example", "eu-west-1\n  more"])
def test_a_region_of_a_profile_is_one(tmp_path, region):
    """It is a part of the server's name."""
    (tmp_path / "config").write_text(f"[default]\nregion = {region}\n")
    with pytest.raises(SettingError, match=r"^region of the AWS profile: must be a region such as us-east-1$"):
        read_settings("s3", {"AWS_CONFIG_FILE": str(tmp_path / "config")}, tmp_path)


def test_the_hubs_endpoint_is_not_repeated(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://user:hunter2@hub.storage.svc")
    with pytest.raises(UserError, match=r"HF_ENDPOINT.*must be a URL") as refused:
        hub.endpoint()
    assert "hunter2" not in str(refused.value)


def test_ends_of_values_are_cleaned_and_empty_ones_are_none():
    environment = {"AWS_ACCESS_KEY_ID": " key\n", "AWS_ENDPOINT_URL": " \n", "HF_TOKEN": "t\r\n", "OTHER": " x "}
    clean_environment(environment)
    assert environment == {"AWS_ACCESS_KEY_ID": "key", "HF_TOKEN": "t", "OTHER": " x "}


def test_a_secret_with_line_breaks_at_its_ends_works(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.setenv(name, f"{os.environ[name]}\n")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "")
    store = open_store(s3, "spec.output.destination")
    store.put("key", b"1")
    assert store.get("key") == b"1"
