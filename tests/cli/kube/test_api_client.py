"""The client: refusals in words, pages, watches that go on."""

import itertools
import json

import pytest

from fake_server import FakeServer
from qlora_cli.kube import api_client as module
from qlora_cli.kube.errors import KubeApiError, UnreachableError

PATH = "/apis/qlora.dev/v1alpha1/namespaces/default/qlorajobs"


@pytest.fixture
def serve():
    started = []

    def start(*answers):
        server = FakeServer(*answers)
        started.append(server.__enter__())
        return server

    yield start
    for server in started:
        server.__exit__()


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(module, "LONGEST_WAIT_SECONDS", 0.02)


def item(name, version):
    return {"metadata": {"name": name, "resourceVersion": str(version)}}


def told(kind, name, version):
    return {"type": kind, "object": item(name, version)}


def listed(*items, version="1", more=""):
    return 200, {"metadata": {"resourceVersion": version, "continue": more}, "items": list(items)}


def take(events, count):
    return [(e.kind, [i["metadata"]["name"] for i in e.items]) for e in itertools.islice(events, count)]


def test_a_list_is_read_page_by_page(serve):
    server = serve(listed(item("a", 1), more="next"), listed(item("b", 2), version="7"))
    with server.api() as api:
        items, version = api.list(PATH)
    assert ([i["metadata"]["name"] for i in items], version) == (["a", "b"], "7")
    assert [q.get("continue") for _, _, q, _ in server.asked] == [None, "next"]


def test_an_object_that_is_nested_as_deep_as_an_api_server_takes_it_hides_no_other(serve):
    depth = 9_000
    fields = '{"f:a":' * depth + "{}" + "}" * depth
    deep = f'{{"metadata": {{"name": "deep", "resourceVersion": "1", "managedFields": {fields}}}}}'
    whole = f'{{"metadata": {{"resourceVersion": "5"}}, "items": [{deep}, {json.dumps(item("b", 2))}]}}'
    server = serve((200, whole), (200, [f'{{"type": "MODIFIED", "object": {deep}}}', told("ADDED", "c", 7)]))
    with server.api() as api:
        assert take(api.follow(PATH), 3) == [("LISTED", ["deep", "b"]), ("MODIFIED", ["deep"]), ("ADDED", ["c"])]


def test_a_watch_goes_on_where_it_ended(serve):
    server = serve(
        listed(item("a", 1), version="5"),
        (200, [told("ADDED", "b", 6), {"type": "BOOKMARK", "object": item("", 9)}]),
        (200, [told("DELETED", "a", 10)]),
    )
    with server.api() as api:
        assert take(api.follow(PATH), 3) == [("LISTED", ["a"]), ("ADDED", ["b"]), ("DELETED", ["a"])]
    assert [q.get("resourceVersion") for _, _, q, _ in server.asked] == [None, "5", "9"]


@pytest.mark.parametrize(
    "old",
    [(410, {"reason": "Expired", "message": "too old"}), (200, [{"type": "ERROR", "object": {"code": 410}}])],
    ids=["by-status", "by-event"],
)
def test_a_version_that_is_too_old_is_listed_anew_without_a_word(serve, old):
    server = serve(listed(item("a", 1)), old, listed(item("b", 2)))
    with server.api() as api:
        assert take(api.follow(PATH), 2) == [("LISTED", ["a"]), ("LISTED", ["b"])]


def test_a_broken_connection_is_told_and_taken_up_again(serve):
    server = serve(listed(item("a", 1)), (200, None), (200, [told("MODIFIED", "a", 2)]))
    with server.api() as api:
        events = api.follow(PATH)
        assert next(events).kind == "LISTED"
        lost = next(events)
        assert lost.kind == "LOST"
        assert "cannot be reached" in lost.text
        assert next(events).kind == "MODIFIED"


def test_a_refused_first_list_ends_it(serve):
    server = serve((403, {"reason": "Forbidden", "message": "no"}))
    with server.api() as api, pytest.raises(KubeApiError):
        next(api.follow(PATH))


def test_lines_end_at_newlines_alone(serve):
    server = serve((200, ["one\x85\u2028still one", "two"]))
    with server.api() as api:
        assert [line.decode() for line in api.lines("/log")] == ["one\x85\u2028still one", "two"]


def test_writes_name_their_author_and_unknown_fields_are_refused(serve):
    server = serve((201, {"kind": "QLoRAJob"}))
    with server.api(token="secret") as api:
        api.create(PATH, {}, dry_run=True)
    ((method, _, query, headers),) = server.asked
    assert (method, query) == ("POST", {"fieldManager": "qlora-cli", "fieldValidation": "Strict", "dryRun": "All"})
    assert headers["Authorization"] == "Bearer secret"


def test_a_password_is_sent_as_basic_authentication(serve):
    server = serve((200, {}))
    with server.api(name="me", password="pass") as api:
        api.get("/version")
    assert server.asked[0][3]["Authorization"] == "Basic bWU6cGFzcw=="


# ---------------------------------------------------------------------------------------------------------- refusals


def status(code, reason, message, *causes, name=""):
    return code, {"reason": reason, "message": message, "details": {"name": name, "causes": list(causes)}}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(
            status(
                422,
                "Invalid",
                "long",
                {"field": "spec.lora.rank", "message": "Invalid value: 0: spec.lora.rank in body should be >= 1"},
                {
                    "field": "spec.training",
                    "message": 'Invalid value: "object": set exactly one of epochs and maxSteps',
                },
                {"field": "spec.output", "message": "Required value"},
                {"field": "<nil>", "message": "Invalid value: null: some validation rules were not checked because …"},
            ),
            "spec.lora.rank: 0 should be >= 1\n"
            "spec.training: set exactly one of epochs and maxSteps\n"
            "spec.output: is required",
            id="each-cause-a-line",
        ),
        pytest.param(
            status(
                403,
                "Forbidden",
                "is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: "
                'spec.model.credentials: "s" – jane may not get this Secret',
            ),
            'spec.model.credentials: "s" – jane may not get this Secret',
            id="admission-policy",
        ),
        pytest.param(
            status(
                403,
                "Forbidden",
                'qlorajobs.qlora.dev is forbidden: User "jane" cannot create resource "qlorajobs" in API group '
                '"qlora.dev" in the namespace "research"',
            ),
            'user "jane" may not create qlorajobs in namespace research; the cluster role edit includes it, '
            "have it bound to you there",
            id="rights",
        ),
        pytest.param(
            status(
                400,
                "BadRequest",
                'QLoRAJob in version "v1alpha1" cannot be handled: strict decoding error: unknown field "spec.x"',
            ),
            'unknown field "spec.x"',
            id="unknown-field",
        ),
        pytest.param(
            (404, "404 page not found\n"),
            "this cluster serves no QLoRAJobs: install the operator, or see 'qlora doctor'",
            id="no-crd",
        ),
        pytest.param(status(409, "Conflict", "try again"), "try again", id="its-own-words"),
        pytest.param((500, ""), f"HTTP 500 for {PATH}", id="no-words"),
    ],
)
def test_refusals_are_readable(serve, answer, words):
    with serve(answer).api() as api, pytest.raises(KubeApiError) as caught:
        api.get(PATH)
    assert str(caught.value) == words


def test_unknown_callers_and_servers_that_are_none_are_unreachable(serve):
    with (
        serve((401, {"message": "Unauthorized"})).api() as api,
        pytest.raises(UnreachableError, match=r"\(context test\) does not know you \(401\): renew the credentials"),
    ):
        api.get(PATH)
    with (
        serve((200, "<html>hello</html>")).api() as api,
        pytest.raises(UnreachableError, match="is no Kubernetes API server"),
    ):
        api.get(PATH)
    server = serve()
    server.__exit__()
    with server.api() as api, pytest.raises(UnreachableError, match=r"cannot be reached: .*refused"):
        api.get(PATH)


def test_a_token_that_is_refused_is_read_again_from_its_file(serve, tmp_path):
    token = tmp_path / "token"
    token.write_text("old")
    server = serve((200, {}), (401, {}), (200, {"ok": True}))
    with server.api(token_file=token) as api:
        api.get("/version")
        token.write_text("new")
        assert api.get("/version") == {"ok": True}
    assert [h["Authorization"] for *_, h in server.asked] == ["Bearer old", "Bearer old", "Bearer new"]


def test_json_is_what_is_sent(serve):
    server = serve((200, {}))
    with server.api() as api:
        api.merge(f"{PATH}/x", {"spec": {"suspend": True}})
    assert server.asked[0][3]["Content-Type"] == "application/merge-patch+json"
    assert json.loads(json.dumps(server.asked[0][2])) == {"fieldManager": "qlora-cli"}
