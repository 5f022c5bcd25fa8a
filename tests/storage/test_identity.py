"""Identities that sign: the job's credentials, a person's files, and the cloud's own where the operator says so."""

import pytest

from qlora_api.environment import WORKLOAD_IDENTITY
from qlora_storage.errors import StorageError, UserError
from qlora_storage.object_store import open_store
from services.metadata import metadata_service
from services.versitygw import ACCESS_KEY, SECRET_KEY

FIELD = "spec.output.destination"
CLOUDS = ("s3", "gs", "az")


@pytest.fixture
def metadata(monkeypatch, tmp_path, request):
    """A machine in a cloud without anybody's credentials, whose metadata service would give some."""
    if "s3" in request.fixturenames:
        request.getfixturevalue("s3")  # sets variables that are taken back below
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", WORKLOAD_IDENTITY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with metadata_service(ACCESS_KEY, SECRET_KEY) as service:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", service.endpoint)
        monkeypatch.setenv("GCE_METADATA_HOST", service.endpoint.removeprefix("http://"))
        monkeypatch.setenv("AZURE_MSI_ENDPOINT", f"{service.endpoint}/metadata/identity/oauth2/token")
        for name in ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP"):
            monkeypatch.setenv(name, "true")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        yield service


@pytest.fixture
def buckets(metadata, monkeypatch):
    """Three stores that let nobody in."""
    for name in ("AWS_ENDPOINT_URL", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT"):
        monkeypatch.setenv(name, metadata.endpoint)
    return metadata


@pytest.mark.parametrize("scheme", CLOUDS)
@pytest.mark.parametrize("value", [None, "false", ""])
def test_without_credentials_no_metadata_service_is_asked_and_nothing_is_signed(buckets, monkeypatch, scheme, value):
    if value is not None:
        monkeypatch.setenv(WORKLOAD_IDENTITY, value)
    with pytest.raises(UserError) as refused:
        open_store(f"{scheme}://bucket/folder", FIELD).get("object")
    assert buckets.asked == []
    assert buckets.signed == [False]
    text = str(refused.value)
    assert text.startswith(f'{FIELD}: "{scheme}://bucket/folder" cannot be used: no credentials were found')
    assert "spec.output.credentials" in text
    assert "chart value trainer.workloadIdentity" in text


@pytest.mark.parametrize("scheme", CLOUDS)
def test_with_the_operators_consent_the_machines_identity_signs(buckets, monkeypatch, scheme):
    monkeypatch.setenv(WORKLOAD_IDENTITY, "true")
    with pytest.raises(UserError, match="access is denied"):
        open_store(f"{scheme}://bucket/folder", FIELD).get("object")
    assert buckets.asked
    assert buckets.signed == [True]


@pytest.fixture
def pod_tokens(buckets, monkeypatch, tmp_path):
    """Variables and the token that EKS and AKS put into pods of a service account that stands for a cloud identity."""
    token = tmp_path / "token"
    token.write_text("of-the-service-account")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/pod")
    monkeypatch.setenv("AWS_STS_ENDPOINT", f"{buckets.endpoint}/sts")
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", str(token))
    monkeypatch.setenv("AZURE_CLIENT_ID", "client")
    monkeypatch.setenv("AZURE_TENANT_ID", "tenant")
    monkeypatch.setenv("AZURE_AUTHORITY_HOST", buckets.endpoint)
    return buckets


@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_without_the_operators_consent_a_pods_own_token_does_not_count(pod_tokens, scheme):
    with pytest.raises(UserError, match="no credentials were found"):
        open_store(f"{scheme}://bucket/folder", FIELD).get("object")
    assert (pod_tokens.asked, pod_tokens.signed) == ([], [False])


def test_with_the_operators_consent_a_pods_own_token_signs_for_azure(pod_tokens, monkeypatch):
    monkeypatch.setenv(WORKLOAD_IDENTITY, "true")
    with pytest.raises(UserError, match="access is denied"):
        open_store("az://container/folder", FIELD).get("object")
    assert [path.partition("/oauth2")[0] for path in pod_tokens.asked] == ["/tenant"]
    assert pod_tokens.signed == [True]


def test_with_the_operators_consent_a_pods_own_token_goes_to_the_token_service_of_aws(pod_tokens, monkeypatch):
    monkeypatch.setenv(WORKLOAD_IDENTITY, "true")
    with pytest.raises(StorageError, match="POST"):  # which obstore asks over https alone: there is none here
        open_store("s3://bucket/folder", FIELD, patience_seconds=0).get("object")
    assert (pod_tokens.asked, pod_tokens.signed) == ([], [])


def test_a_sas_token_of_the_job_is_not_passed_over_for_the_pods(pod_tokens, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2024-11-04&sig=c2ln")
    with pytest.raises(UserError):
        open_store("az://container/folder", FIELD).get("object")
    assert pod_tokens.asked == []


def test_a_real_server_lets_the_machine_in_with_consent_and_not_without(s3, metadata, monkeypatch):
    with pytest.raises(UserError, match=r"no credentials were found.*403"):
        open_store(s3, FIELD).put("key", b"1")
    assert metadata.asked == []
    monkeypatch.setenv(WORKLOAD_IDENTITY, "true")
    store = open_store(s3, FIELD)
    store.put("key", b"1")
    assert store.get("key") == b"1"
    assert metadata.asked


# --------------------------------------------------------------------------------------------------- files of a person


def test_the_profile_that_aws_tools_use_signs(s3, metadata, monkeypatch, tmp_path):
    folder = tmp_path / ".aws"
    folder.mkdir()
    keys = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    (folder / "credentials").write_text(f"[default]\n{keys}[wrong]\n{keys.replace(SECRET_KEY, 'x')}")
    open_store(s3, FIELD).put("key", b"1")
    monkeypatch.setenv("AWS_PROFILE", "wrong")
    with pytest.raises(UserError, match="SignatureDoesNotMatch"):
        open_store(s3, FIELD).put("key", b"2")
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(UserError, match=r'AWS_PROFILE: "none" is in none of .*\.aws'):
        open_store(s3, FIELD)
    assert metadata.asked == []


def test_region_and_endpoint_come_from_the_profile_too(s3, metadata, monkeypatch, tmp_path, s3_server):
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    (tmp_path / "config").write_text(
        f"[profile team]\nregion = us-east-1\nendpoint_url = {s3_server.url}\n"
        f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    store = open_store(s3, FIELD)
    store.put("key", b"1")
    assert store.get("key") == b"1"


@pytest.mark.parametrize(
    "signs_in", ["sso_session = x", "credential_process = /bin/x", "role_arn = arn:aws:iam::1:role/x"]
)
def test_a_profile_that_signs_in_by_other_means_says_how_to_use_it(s3, metadata, monkeypatch, tmp_path, signs_in):
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    (tmp_path / "config").write_text(f"[default]\n{signs_in}\n")
    with pytest.raises(UserError, match=r"export-credentials --format env"):
        open_store(s3, FIELD)


def test_a_temporary_key_without_its_token_is_named(s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ASIAIOSFODNN7EXAMPLE")
    with pytest.raises(UserError, match="AWS_SESSION_TOKEN: is missing or empty"):
        open_store(s3, FIELD)
