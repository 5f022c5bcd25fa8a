"""Models and rows arrive whole and checked, or the user is told what to change."""

import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_storage import hub as hub_module
from qlora_storage import object_store as store_module
from qlora_storage.object_store import open_store
from qlora_trainer.errors import StorageError, UserError
from qlora_trainer.storage import fetch
from qlora_trainer.storage.fetch import fetch_model, model_revision
from qlora_trainer.storage.model_files import safetensors_header
from services.fake_hub import COMMIT
from storage_fixtures import names, upload

# --------------------------------------------------------------------------------------------------------- local models


def test_of_a_local_model_the_configuration_is_copied_and_the_weights_are_linked(tmp_path, make_model):
    folder = make_model(tmp_path / "model", shards=2)
    for source in (str(folder), f"file://{folder}"):
        fetched = fetch_model(source, tmp_path / "cache")
        assert fetched.source == source
        assert (fetched.path.parent, names(fetched.path)) == (tmp_path / "cache" / "bases", names(folder))
        links = {p.name: p.resolve() for p in fetched.path.iterdir() if p.is_symlink()}
        assert links == {p.name: p for p in folder.glob("*.safetensors")}


def test_a_mounted_claim_is_found(tmp_path, make_model, monkeypatch):
    monkeypatch.setattr(store_module, "PVC_MOUNT", tmp_path)
    make_model(tmp_path / "claim" / "models" / "m")
    fetched = fetch_model("pvc://claim/models/m", tmp_path / "cache")
    assert fetched.source == "pvc://claim/models/m"
    assert (fetched.path / "model.safetensors").resolve() == tmp_path / "claim/models/m/model.safetensors"


@pytest.mark.parametrize(
    ("change", "new_revision", "new_tokenizer"),
    [
        pytest.param(lambda f: None, False, False, id="nothing"),
        pytest.param(lambda f: (f / "README.md").write_text("words"), False, False, id="a-readme"),
        pytest.param(lambda f: (f / "config.json").write_text('{"model_type": "opt"}'), True, False, id="the-config"),
        pytest.param(lambda f: (f / "tokenizer.json").write_text("{}"), True, True, id="the-tokenizer"),
        pytest.param(lambda f: (f / "chat_template.jinja").write_text("{{ x }}"), True, True, id="the-chat-template"),
    ],
)
def test_revision_and_tokenizer_hash_follow_the_content(tmp_path, make_model, change, new_revision, new_tokenizer):
    folder = make_model(tmp_path / "model")
    before = fetch_model(str(folder), tmp_path / "cache")
    change(folder)
    after = fetch_model(str(folder), tmp_path / "cache")
    assert (after.revision != before.revision) == new_revision
    assert (after.tokenizer_hash != before.tokenizer_hash) == new_tokenizer


def test_models_of_other_shapes_have_other_revisions(tmp_path, make_model):
    revisions = {fetch_model(str(make_model(tmp_path / str(w), width=w)), tmp_path).revision for w in (8, 16)}
    assert len(revisions) == 2


def _cut(name, keep):
    return lambda f: (f / name).write_bytes((f / name).read_bytes()[:keep])


def _lengthen(f):
    (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"\0")


def _with_code(f):
    (f / "generation_config.json").write_text('{"auto_map": {"AutoX": "generation_x.Generation"}}')


def _pickled(f):
    (f / "model.safetensors").rename(f / "pytorch_model.bin")


def _index(text):
    return lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text(text))


def _adapter(f):
    (f / "config.json").rename(f / "adapter_config.json")


BAD_MODELS = [
    pytest.param(lambda f: (f / "config.json").unlink(), "has no config.json", id="no-config"),
    pytest.param(_adapter, "this is an adapter, name its base", id="an-adapter"),
    pytest.param(lambda f: (f / "config.json").write_text("{"), "config.json that is not JSON", id="config-unreadable"),
    pytest.param(lambda f: (f / "config.json").write_text("[]"), "not a JSON object", id="config-no-object"),
    pytest.param(_with_code, r"brings its own code .*generation_x\.Generation", id="auto-map"),
    pytest.param(_pickled, r"only pickled weights \(pytorch_model\.bin\).*save_pretrained", id="pickled-weights"),
    pytest.param(lambda f: (f / "model.safetensors").unlink(), r"has neither model\.safetensors", id="no-weights"),
    pytest.param(
        lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"),
        "it has consolidated.safetensors",
        id="weights-of-another-layout",
    ),
    pytest.param(_cut("model.safetensors", -1), r"cut short \(\d+ of \d+ bytes", id="truncated-weights"),
    pytest.param(_cut("model.safetensors", 20), "without a safetensors header", id="truncated-header"),
    pytest.param(_cut("model.safetensors", 0), "without a safetensors header", id="empty-weights"),
    pytest.param(_lengthen, "where its header says", id="weights-too-long"),
    pytest.param(
        lambda f: (f / "model.safetensors").write_bytes((9).to_bytes(8, "little") + b"{not json"),
        "header that cannot be read",
        id="header-no-json",
    ),
    pytest.param(_index('{"weight_map": {"a": "gone.safetensors"}}'), "lacks gone.safetensors", id="shard-missing"),
    pytest.param(_index("{}"), "index.json that cannot be read", id="index-unreadable"),
    pytest.param(_index('{"weight_map": {"a": "../x.safetensors"}}'), "beside it", id="index-points-outside"),
    pytest.param(lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer", id="no-tokenizer"),
]


@pytest.mark.parametrize(("spoil", "said"), BAD_MODELS)
def test_a_model_that_cannot_be_used_is_refused_with_the_reason(tmp_path, make_model, spoil, said):
    folder = make_model(tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match=said) as caught:
        fetch_model(str(folder), tmp_path)
    assert str(caught.value).startswith(f'spec.model.source: "{folder}"')


@pytest.mark.parametrize(
    ("name", "said"),
    [pytest.param("none", "does not exist", id="missing"), pytest.param("file", "is not a folder", id="file")],
)
def test_a_source_that_is_no_folder_is_refused(tmp_path, name, said):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=said):
        fetch_model(str(tmp_path / name), tmp_path)


# ------------------------------------------------------------------------------------------------------ models from S3


def test_a_model_in_a_bucket_is_fetched_once_without_pickles_and_code(tmp_path, make_model, s3):
    folder = make_model(tmp_path / "model", shards=2)
    for extra in ("pytorch_model.bin", "modeling_x.py", "README.md", "original/consolidated.safetensors"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"x")
    source = upload(folder, f"{s3}/models/m")
    first = fetch_model(source, tmp_path / "cache")
    assert names(first.path) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    before = (first.path / "config.json").stat().st_ino
    assert fetch_model(source, tmp_path / "cache") == first
    assert (first.path / "config.json").stat().st_ino == before
    assert first.tokenizer_hash == fetch_model(str(folder), tmp_path / "cache").tokenizer_hash


def test_a_changed_model_in_a_bucket_is_another_model(tmp_path, make_model, s3):
    source = upload(make_model(tmp_path / "model"), s3)
    first = fetch_model(source, tmp_path / "cache")
    open_store(s3, "x").put("config.json", b'{"model_type": "opt"}')
    second = fetch_model(source, tmp_path / "cache")
    assert second.revision != first.revision
    assert json.loads((first.path / "config.json").read_text())["model_type"] == "llama"
    assert json.loads((second.path / "config.json").read_text())["model_type"] == "opt"


@pytest.mark.parametrize(("spoil", "said"), [p for p in BAD_MODELS if p.id != "an-adapter"])
def test_a_bad_model_in_a_bucket_is_refused_and_leaves_nothing_in_the_cache(tmp_path, make_model, s3, spoil, said):
    folder = make_model(tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match=said):
        fetch_model(upload(folder, s3), tmp_path / "cache")
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path, make_model, s3):
    source = upload(make_model(tmp_path / "model", shards=2), s3)
    whole = fetch_model(source, tmp_path / "cache").path
    partial = whole.with_name(f".{whole.name}.partial")
    whole.rename(partial)
    (partial / "model-00002-of-00002.safetensors").rename(partial / "model-00002-of-00002.safetensors.part")
    kept = (partial / "model-00001-of-00002.safetensors").stat().st_ino
    again = fetch_model(source, tmp_path / "cache").path
    assert again == whole
    assert (again / "model-00001-of-00002.safetensors").stat().st_ino == kept
    assert names(again) == names(tmp_path / "model")


def test_ranks_that_fetch_at_once_download_once(tmp_path, make_model, s3):
    source = upload(make_model(tmp_path / "model"), s3)
    together = threading.Barrier(4)

    def fetch(_):
        together.wait()
        fetched = fetch_model(source, tmp_path / "cache")
        return fetched.path, (fetched.path / "config.json").stat().st_ino

    with ThreadPoolExecutor(4) as ranks:
        assert len(set(ranks.map(fetch, range(4)))) == 1


def test_a_full_cache_is_a_storage_failure(tmpfs, tmp_path, make_model, s3):
    source = upload(make_model(tmp_path / "model", width=1024), s3)
    with tmpfs("size=1m") as cache, pytest.raises(StorageError, match="disk is full"):
        fetch_model(source, cache)


def test_an_empty_or_closed_bucket_is_the_users_to_mend(tmp_path, s3, monkeypatch):
    with pytest.raises(UserError, match="holds no files"):
        fetch_model(f"{s3}/nothing-here", tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r"403.*spec\.model\.credentials"):
        fetch_model(s3, tmp_path)


# ------------------------------------------------------------------------------------------------------------- the Hub


def as_files(folder):
    return {name: (folder / name).read_bytes() for name in names(folder)}


@pytest.mark.parametrize("place", ["bucket", "hub"])
def test_a_second_template_for_tools_is_fetched(tmp_path, make_model, s3, hub, place):
    folder = make_model(tmp_path / "model")
    template = "additional_chat_templates/tool_use.jinja"
    (folder / template).parent.mkdir()
    (folder / template).write_text("{{ tools }}")
    if place == "hub":
        hub.add("org/base", {**as_files(folder), template: b"{{ tools }}"})
    source = "hf://org/base" if place == "hub" else upload(folder, f"{s3}/models/m")
    fetched = fetch_model(source, tmp_path / "cache")
    assert (fetched.path / template).read_text() == "{{ tools }}"
    assert fetched.tokenizer_hash == fetch_model(str(folder), tmp_path / "cache").tokenizer_hash


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_a_model_on_the_hub_is_pinned_to_its_commit(tmp_path, make_model, hub, revision):
    files = as_files(make_model(tmp_path / "model", shards=2))
    unwanted = {"pytorch_model.bin": b"x", "modeling_x.py": b"x", "original/consolidated.safetensors": b"x"}
    hub.add("org/base", files | unwanted)
    source = f"hf://org/base{revision}"
    fetched = fetch_model(source, tmp_path / "cache")
    assert (fetched.revision, fetched.source) == (COMMIT, source)
    assert names(fetched.path) == sorted(files)
    assert sorted(hub.served) == sorted(files)
    assert fetch_model(source, tmp_path / "cache") == fetched
    assert sorted(hub.served) == sorted(files), "the second time nothing is downloaded"


@pytest.mark.parametrize(
    ("source", "refused", "said"),
    [
        pytest.param("hf://org/none", {}, r"is not a model on .*spec\.model\.credentials", id="not-found"),
        pytest.param("hf://org/base@v9", {}, "has no revision v9", id="no-such-revision"),
        pytest.param("hf://org/base", {"org/base": (403, "GatedRepo")}, "is gated: accept its terms at", id="gated"),
        pytest.param("hf://org/base", {"org/base": (401, "")}, "HF_TOKEN", id="wrong-token"),
        pytest.param("hf://base", {}, "must read hf://org/name", id="no-organization"),
        pytest.param("hf://org/base/folder", {}, "not a folder inside", id="folder-inside"),
        pytest.param("hf://org/base@main/../x", {}, "must not contain", id="climbs-out"),
    ],
)
def test_what_the_hub_does_not_give_is_the_users_to_mend(tmp_path, make_model, hub, source, refused, said):
    hub.add("org/base", as_files(make_model(tmp_path / "model")))
    hub.refused.update(refused)
    with pytest.raises(UserError, match=said) as caught:
        fetch_model(source, tmp_path / "cache")
    assert str(caught.value).startswith(f'spec.model.source: "{source}"')


@pytest.mark.parametrize("token", ["Bearer hf_hunter2", "$(HUNTER2)", "None", "'hunter2'"])
def test_a_token_that_cannot_be_meant_is_named_and_not_shown(tmp_path, make_model, hub, monkeypatch, token):
    hub.add("org/base", as_files(make_model(tmp_path / "model")))
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        UserError, match=r'^spec\.model\.source: "hf://org/base" cannot be asked for: HF_TOKEN: '
    ) as caught:
        fetch_model("hf://org/base", tmp_path / "cache")
    assert "hunter2" not in str(caught.value).lower()


@pytest.mark.parametrize("token", ["hf_ключ", "hf_\x01", "hf_a\x7f"])
def test_a_token_that_no_request_can_carry_is_named_and_not_shown(tmp_path, make_model, hub, monkeypatch, token):
    hub.add("org/base", as_files(make_model(tmp_path / "model")))
    monkeypatch.setenv("HF_TOKEN", token)
    said = r'^spec\.model\.source: "hf://org/base" cannot be asked for: HF_TOKEN has a character that no token has'
    with pytest.raises(UserError, match=said) as caught:
        fetch_model("hf://org/base", tmp_path / "cache")
    assert token not in str(caught.value)


@pytest.mark.parametrize("commit_is_named", [False, True])
def test_without_a_way_to_the_hub_the_user_is_told_what_else_works(tmp_path, monkeypatch, commit_is_named):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_module, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"cannot be reached .* s3://, gs://, az:// or pvc://"):
        fetch_model(f"hf://org/base@{COMMIT}" if commit_is_named else "hf://org/base", tmp_path)


def test_a_hub_that_fails_is_a_storage_failure(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(hub_module, "PATIENCE_SECONDS", 0.1)
    hub.refused["org/base"] = (503, "")
    with pytest.raises(StorageError, match="answers 503"):
        fetch_model("hf://org/base", tmp_path)


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_busy_is_waited_for_as_long_as_it_says(tmp_path, make_model, hub, caplog, status):
    hub.add("org/base", as_files(make_model(tmp_path / "model")))
    hub.busy = [(status, "2"), (status, "")]
    with caplog.at_level(logging.WARNING):
        assert fetch_model("hf://org/base", tmp_path / "cache").revision == COMMIT
    assert [record.args[1] for record in caplog.records if "yet, next try" in record.msg] == [2, 1]


def test_offline_the_hubs_own_cache_is_enough(tmp_path, make_model, hub):
    """As people have it who ran 'hf download' where there is a way out."""
    hub.add("org/base", as_files(make_model(tmp_path / "model", shards=2)))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint}
    download = "import huggingface_hub; huggingface_hub.snapshot_download('org/base')"
    subprocess.run([sys.executable, "-c", download], env=environment, check=True, capture_output=True)
    fetch = (
        "import sys; from pathlib import Path; from qlora_trainer.storage.fetch import fetch_model\n"
        "fetched = fetch_model(sys.argv[1], Path(sys.argv[2])); print(fetched.path, fetched.revision)"
    )
    environment |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}

    def offline(source):
        command = [sys.executable, "-c", fetch, source, tmp_path / "cache"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    path, revision = offline("hf://org/base@main").stdout.split()
    assert revision == COMMIT
    assert as_files(Path(path)) == as_files(tmp_path / "model")
    assert "HF_HUB_OFFLINE is set: fetch it" in offline("hf://org/other").stderr


@pytest.mark.parametrize("sized", [True, False], ids=["parts", "chunks-of-unknown-size"])
def test_a_part_of_a_file_comes_with_its_size(hub, sized):
    hub.add("org/base", {"weights": bytes(range(200))})
    hub.sized = sized
    folder = hub_module.open_folder(hub_module.parse("hf://org/base", "spec.model.source", "model"), COMMIT)
    assert folder.read("weights", 0, 8) == (bytes(range(8)), 200)
    assert folder.read("weights", 90, 110) == (bytes(range(90, 110)), 200)
    assert folder.read("weights", 150, 300) == (bytes(range(150, 200)), 200)


def test_what_a_url_asks_with_is_not_repeated():
    error = OSError("503 for https://cdn.org/x?X-Amz-Signature=secret&Policy=p (and 'https://hub/a?token=secret')?")
    assert hub_module.without_queries(error) == "503 for https://cdn.org/x?… (and 'https://hub/a?…')?"


def test_a_pinned_model_in_the_cache_needs_no_hub(tmp_path, make_model, hub, monkeypatch):
    hub.add("org/base", as_files(make_model(tmp_path / "model")))
    fetched = fetch_model(f"hf://org/base@{COMMIT}", tmp_path / "cache")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch_model(f"hf://org/base@{COMMIT}", tmp_path / "cache") == fetched


def test_the_revision_a_job_began_with_comes_even_if_the_branch_has_moved(tmp_path, make_model, hub):
    hub.add("org/base", as_files(make_model(tmp_path / "model")))
    assert model_revision("hf://org/base@main", tmp_path) == COMMIT
    fetched = fetch_model("hf://org/base@gone", tmp_path / "cache", pinned=COMMIT)
    assert fetched.revision == COMMIT


@pytest.mark.parametrize(
    ("spoil", "said"), [p for p in BAD_MODELS if p.id in ("auto-map", "pickled-weights", "truncated-weights")]
)
def test_a_bad_model_on_the_hub_is_refused(tmp_path, make_model, hub, spoil, said):
    folder = make_model(tmp_path / "model")
    spoil(folder)
    hub.add("org/base", as_files(folder))
    with pytest.raises(UserError, match=said):
        fetch_model("hf://org/base", tmp_path / "cache")
    assert not any(name.endswith(".bin") for name in hub.served)


# ------------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize("place", ["bucket", "hub"])
def test_headers_alone_tell_all_but_the_weights_and_are_never_loaded_as_such(
    tmp_path, make_model, s3, hub, monkeypatch, place
):
    monkeypatch.setattr(fetch, "FIRST_READ", 64)  # less than a header, so that both reads happen
    folder = make_model(tmp_path / "model", shards=2, width=512)
    hub.add("org/base", as_files(folder))
    source = "hf://org/base" if place == "hub" else upload(folder, f"{s3}/models/large")
    light = fetch_model(source, tmp_path / "cache", headers_only=True)
    weights = [name for name in names(folder) if name.endswith(".safetensors")]
    for name in weights:
        assert safetensors_header(light.path / name) == safetensors_header(folder / name)
        assert (light.path / name).stat().st_size == (folder / name).stat().st_size
        assert (light.path / name).stat().st_blocks * 512 < 16384, "holes take no room"
    if place == "hub":
        assert sum(hub.ranges) < 1024
        assert not set(weights) & set(hub.served[: -len(hub.ranges)])
    whole = fetch_model(source, tmp_path / "cache")
    assert (whole.revision, whole.path != light.path) == (light.revision, True)
    assert [(whole.path / n).read_bytes() for n in weights] == [(folder / n).read_bytes() for n in weights]
    assert fetch_model(source, tmp_path / "cache", headers_only=True) == whole, "what is here whole serves as well"


def test_a_weight_file_that_is_none_is_refused_by_its_header(tmp_path, make_model, s3):
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")
    source = upload(folder, f"{s3}/models/page")
    with pytest.raises(UserError, match=r"model\.safetensors that does not begin as a safetensors file does"):
        fetch_model(source, tmp_path / "cache", headers_only=True)
    assert not list((tmp_path / "cache" / "headers").glob("[!.]*"))
