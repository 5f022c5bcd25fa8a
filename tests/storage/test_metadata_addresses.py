"""No server that a job names is at an address at which clouds serve credentials."""

import json

import pytest

from qlora_api.environment import WORKLOAD_IDENTITY
from qlora_storage import hub
from qlora_storage.errors import UserError
from qlora_storage.metadata_addresses import REFUSED, leads_to_metadata
from qlora_storage.object_store import open_store

FIELD = "spec.dataset.train.source"
HOSTS = (
    *("169.254.169.254", "169.254.170.23", "168.63.129.16", "192.0.0.192", "100.100.100.200"),
    *("[fe80::1]", "[fd00:ec2::254]", "[fd20:ce::254]", "[fd00:c1::a9fe:a9fe]", "[fd00:42::42]"),
    *("[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b::100.100.100.200]"),
    *("2852039166", "0xa9fea9fe", "169.254.43518"),  # names until they are resolved
)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ENDPOINT_URL", WORKLOAD_IDENTITY):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")


@pytest.mark.parametrize("host", HOSTS)
def test_an_endpoint_at_an_address_of_credentials_is_refused(monkeypatch, host):
    monkeypatch.setenv("AWS_ENDPOINT", f"http://{host}:80")
    with pytest.raises(UserError) as refused:
        open_store("s3://latest/meta-data", FIELD)
    assert f"AWS_ENDPOINT: {REFUSED}" in str(refused.value)
    assert host not in str(refused.value)


@pytest.mark.parametrize(
    ("scheme", "name", "value"),
    [
        ("s3", "AWS_ENDPOINT_URL_S3", "http://169.254.169.254"),
        ("s3", "AWS_ENDPOINT_URL", "http://169.254.169.254"),
        ("az", "AZURE_STORAGE_ENDPOINT", "http://169.254.169.254"),
        ("gs", "GOOGLE_BASE_URL", "http://169.254.169.254"),
        ("gs", "GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps({"gcs_base_url": "http://169.254.169.254"})),
        ("gs", "GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps({"gcs_base_url": "http://x@169.254.169.254"})),
    ],
)
def test_every_setting_that_names_a_server_is_looked_at(monkeypatch, scheme, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}: (leads to|its gcs_base_url must be)"):
        open_store(f"{scheme}://bucket/folder", FIELD)


def test_a_hub_at_an_address_of_credentials_is_refused(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://169.254.169.254")
    with pytest.raises(UserError, match=r"HF_ENDPOINT.*leads to"):
        hub.endpoint()
    monkeypatch.setenv(WORKLOAD_IDENTITY, "true")
    assert hub.endpoint() == "http://169.254.169.254"


def test_with_the_operators_consent_such_an_endpoint_is_used(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT", "http://169.254.169.254")
    monkeypatch.setenv(WORKLOAD_IDENTITY, "true")
    open_store("s3://bucket/folder", FIELD)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.0.0.1", "[fd00::1]", "[64:ff9b::a00:1]", "[0:0]"])
def test_other_addresses_are_not_refused(host):
    assert not leads_to_metadata(f"http://{host}:9000", {})
