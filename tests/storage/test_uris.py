"""URIs and paths that would silently name another place: refused wherever a place is named."""

import pytest

from qlora_storage.errors import UserError
from qlora_storage.local_paths import uri_problem
from qlora_storage.object_store import local_path, open_store

FIELD = "spec.output.destination"
ELSEWHERE = {
    "s3:/bucket/x": "must be written as s3://name/folder",
    "s3:bucket/x": "must be written as s3://name/folder",
    "S3:/bucket/x": "must be written as S3://name/folder",
    "hdfs:/x": "must be written as hdfs://name/folder",
    "hf:org/model": "must be written as hf://name/folder",
    "file:/tmp/x": "must be written as file:///folder/name",
    "file:x": "must be written as file:///folder/name",
    "file://host/x": "must have an absolute path after file://",
    "file://./x": "must have an absolute path after file://",
    "file://": "must have an absolute path after file://",
    "$HOME/x": "must not have variables",
    "./$HOME/x": "must not have variables",
    "/data/${USER}/x": "must not have variables",
    "s3://bucket/$USER/x": "must not have variables",
    "s3://$(BUCKET)/x": "must not have variables",
    "s3://$BUCKET/x": "must not have variables",
    "pvc://claim/run-${N}": "must not have variables",
    "az://$web/$USER": "must not have variables",
    "s3://user:hunter2@bucket/x": "must have nothing but the name between s3:// and the next slash",
    "gs://bucket:9000/x": "must have nothing but the name between gs:// and the next slash",
    "s3://bucket/x?versionId=3": "must not have a query",
}
MEANT = (
    *("x", "./x", "../x", "/x", "~/x", "~user/x", "./s3:/x", "a:b", "12:30/x", "C3:x", "a b/c", "costs $5", "x/$5"),
    *(
        "file:///x",
        "s3://bucket",
        "s3:///bucket/x",
        "s3://my.bucket_1/a b/c=1/x?",
        "s3://b/why?",
        "gs://b/x",
        "az://$web/x",
        "az://c/x",
    ),
    *("pvc://claim/x", "hf://org/model@main", "hf://org/model@refs/pr/1", ""),
)


@pytest.mark.parametrize("uri", ELSEWHERE)
def test_a_place_that_cannot_be_meant_is_refused(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    for use in (local_path, open_store):
        with pytest.raises(UserError, match=rf"^{FIELD}: .*{ELSEWHERE[uri]}") as refused:
            use(uri, FIELD)
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("uri", MEANT)
def test_a_place_that_can_be_meant_is_left_alone(uri):
    assert uri_problem(uri) is None


@pytest.mark.parametrize(
    ("path", "refused"),
    [("/bucket-9", True), ("/other/", True), ("/storage/v1/bucket-9", True), ("/storage/v1", False)],
)
def test_an_endpoint_that_names_a_bucket_is_refused(monkeypatch, path, refused):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://minio.example:9000{path}")
    if not refused:
        open_store("s3://bucket-9/x", FIELD)
        return
    with pytest.raises(UserError, match=r"AWS_ENDPOINT_URL: must be the server alone, .* is named by s3://bucket-9"):
        open_store("s3://bucket-9/x", FIELD)
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    open_store("s3://bucket-9/x", FIELD)


def test_a_host_of_one_bucket_is_no_endpoint_of_all(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://data.s3.eu-west-1.amazonaws.com")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL: must be the server alone"):
        open_store("s3://data/x", FIELD)
    open_store("s3://other/x", FIELD)
