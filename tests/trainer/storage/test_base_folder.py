"""Folder of a base: libraries can load exactly the files that were checked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_storage import object_store
from qlora_trainer.errors import UserError
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.storage import base_folder
from qlora_trainer.storage.base_folder import changed_file, without_file_names
from qlora_trainer.storage.fetch import fetch_model, model_revision
from qlora_trainer.storage.model_files import ModelFilesError
from testing.opened_files import opened_files


@pytest.fixture
def base(tmp_path, make_model):
    """A base with a tokenizer of three words."""
    folder = make_model(tmp_path / "source" / "base")
    words = Tokenizer(models.WordLevel({"checked": 0, "words": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    change(folder, "config.json", num_attention_heads=2)
    return folder


@pytest.fixture
def elsewhere(tmp_path, base):
    """A tokenizer that nobody checked, in the forms in which a configuration can name one."""
    folder = tmp_path / "elsewhere"
    (folder / "additional_chat_templates").mkdir(parents=True)
    other = (base / "tokenizer.json").read_text().replace("checked", "smuggled")
    for name in ("tokenizer.json", "tokenizer.5.0.0.json", "other.json"):
        (folder / name).write_text(other)
    (folder / "vocab.json").write_text('{"smuggled": 0}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "model.gguf").write_bytes(b"GGUF")
    return folder


def change(base: Path, name: str, **keys) -> None:
    file = base / name
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | keys))


TRAPS = {
    "tokenizer_config": lambda b, e: change(b, "tokenizer_config.json", tokenizer_file=f"{e}/other.json"),
    "special_tokens_map": lambda b, e: change(b, "special_tokens_map.json", tokenizer_file=f"{e}/other.json"),
    "newer_version": lambda b, e: change(
        b, "tokenizer_config.json", fast_tokenizer_files=[f"{os.path.relpath(e, b)}/tokenizer.5.0.0.json"]
    ),
    "newer_version_beside": lambda b, e: (
        (b / "tokenizer.5.0.0.json").write_text((e / "other.json").read_text()),
        change(b, "tokenizer_config.json", fast_tokenizer_files=["tokenizer.5.0.0.json"]),
    ),
    "vocabulary": lambda b, e: change(
        b, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", vocab=f"{e}/vocab.json", merges=f"{e}/merges.txt"
    ),
    "init_inputs": lambda b, e: change(b, "tokenizer_config.json", init_inputs=[f"{e}/vocab.json"]),
    "gguf": lambda b, e: change(b, "tokenizer_config.json", gguf_file=f"{e}/model.gguf"),
    "template_folder": lambda b, _: (
        (b / "additional_chat_templates").mkdir(),
        (b / "additional_chat_templates" / "default.jinja").write_text("smuggled"),
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_tokenizer_opens_nothing_but_files_that_were_checked(tmp_path, base, elsewhere, trap):
    TRAPS[trap](base, elsewhere)
    path = fetch_model(str(base), tmp_path / "cache").path
    with opened_files(base, base / "additional_chat_templates", elsewhere) as opened:
        tokenizer = load_tokenizer(path)
        assert opened() == [], "all is loaded from the copy"
    assert "checked" in tokenizer.get_vocab()
    assert "smuggled" not in str(tokenizer.chat_template)


def test_a_link_out_of_the_folder_is_refused(tmp_path, base):
    secret = tmp_path / "secret.txt"
    secret.write_text("AWS_SECRET_ACCESS_KEY=x")
    (base / "vocab.txt").symlink_to(secret)
    with pytest.raises(UserError, match=r"vocab\.txt that is a link to .*secret\.txt") as caught:
        fetch_model(str(base), tmp_path / "cache")
    assert "AWS" not in str(caught.value)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and "AWS" in p.read_text()]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_weights_and_configuration_may_not_be_links_out_of_the_folder(tmp_path, base, name):
    (base / name).rename(tmp_path / name)
    (base / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} that is a link to .*put the file itself there"):
        fetch_model(str(base), tmp_path / "cache")


def test_a_pipe_is_not_waited_for(tmp_path, base):
    (base / "merges.txt").symlink_to(base / "pipe")
    os.mkfifo(base / "pipe")
    with pytest.raises(UserError, match=r"merges\.txt that is no plain file"):
        fetch_model(str(base), tmp_path / "cache")


def in_the_hugging_face_cache(base: Path, folder: Path) -> Path:
    """Move a base's files there; the snapshot."""
    blobs, snapshot = folder / "models--org--base" / "blobs", folder / "models--org--base" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / f"{number:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{number:040x}", link.parent))
    return snapshot


def test_a_snapshot_of_the_hugging_face_cache_is_used(tmp_path, base):
    snapshot = in_the_hugging_face_cache(base, tmp_path)
    fetched = fetch_model(str(snapshot), tmp_path / "cache")
    assert (fetched.path / "model.safetensors").resolve().parent == tmp_path / "models--org--base" / "blobs"
    (snapshot / "vocab.txt").symlink_to("../../blobs/../../../secret")
    with pytest.raises(UserError, match=r"vocab\.txt that is a link to"):
        fetch_model(str(snapshot), tmp_path / "cache")


@pytest.mark.parametrize("layout", ["folder", "cache"])
def test_a_second_template_for_tools_is_part_of_a_base(tmp_path, base, layout):
    templates = base / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (templates / "rag.jinja").write_text("{{ documents }}")
    (base / "chat_template.jinja").write_text("plain")
    if layout == "cache":
        base = in_the_hugging_face_cache(base, tmp_path)
    fetched = fetch_model(str(base), tmp_path / "cache")
    assert load_tokenizer(fetched.path).chat_template == {"default": "plain", "tool_use": "{{ tools }}"}
    templates = base / "additional_chat_templates"
    (templates / "tool_use.jinja").unlink()
    (templates / "tool_use.jinja").write_text("{{ tools | tojson }}")
    changed = fetch_model(str(base), tmp_path / "cache")
    assert changed.revision != fetched.revision
    assert changed.tokenizer_hash != fetched.tokenizer_hash


def test_a_second_template_in_a_folder_that_is_a_link_is_refused(tmp_path, base, elsewhere):
    (elsewhere / "additional_chat_templates" / "tool_use.jinja").write_text("smuggled")
    (base / "additional_chat_templates").symlink_to(elsewhere / "additional_chat_templates")
    with pytest.raises(UserError, match=r"tool_use\.jinja in a folder that is a link; put the folder itself there"):
        fetch_model(str(base), tmp_path / "cache")


def test_a_base_does_not_lead_out_of_its_claim(tmp_path, base, monkeypatch):
    claims = base.parent.parent / "claims"
    monkeypatch.setattr(object_store, "PVC_MOUNT", claims)
    (claims / "mine").mkdir(parents=True)
    base.parent.rename(claims / "theirs")
    (claims / "mine" / "model").symlink_to("../theirs/base")
    (claims / "mine" / "folder").symlink_to("../theirs")
    for path in ("model", "folder/base"):
        with pytest.raises(UserError, match="leads out of its claim by a link"):
            fetch_model(f"pvc://mine/{path}", tmp_path / "cache")
        with pytest.raises(ModelFilesError, match="leads out of its claim by a link"):
            model_revision(f"pvc://mine/{path}", tmp_path / "cache")
    shutil.copytree(claims / "theirs" / "base", claims / "mine" / "new")
    (claims / "mine" / "latest").symlink_to("new")
    assert fetch_model("pvc://mine/latest", tmp_path / "cache").revision


def test_a_snapshot_whose_blobs_are_elsewhere_is_refused(tmp_path, base):
    snapshot = tmp_path / "models--org--base" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").symlink_to(base)
    for file in base.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    with pytest.raises(UserError, match="in a folder that is a link"):
        fetch_model(str(snapshot), tmp_path / "cache")


def test_kernels_and_files_that_a_configuration_names_are_left_out_at_any_depth():
    kept = {"model_type": "llama", "_name_or_path": "org/base", "vocab_size": 3, "profile": {"a": [1]}}
    named = {
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "gguf_file": "x.gguf",
        "sp_model_kwargs": {"model_file": "/etc/passwd", "nbest_size": 1},
        "text_config": [{"attn_implementation": "someone/kernel"}],
    }
    assert without_file_names(kept | named) == kept | {"sp_model_kwargs": {"nbest_size": 1}, "text_config": [{}]}


# -------------------------------------------------------------------------------------------------------- what changed


def flip(path: Path, *, at: int = -1) -> None:
    """Change one byte and nothing that is usually looked at: neither the size nor the time."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_one_byte_of_the_weights_makes_another_revision(tmp_path, base, monkeypatch):
    monkeypatch.setattr(base_folder, "SETTLED_SECONDS", 0.0)
    before = fetch_model(str(base), tmp_path / "cache")
    assert fetch_model(str(base), tmp_path / "cache") == before
    assert changed_file(before.path) is None
    flip(base / "model.safetensors")
    assert changed_file(before.path) == "model.safetensors"
    with pytest.raises(UserError, match=r"spec\.model\.source.* the run began on"):
        fetch_model(str(base), tmp_path / "cache", pinned=before.revision)
    flip(base / "model.safetensors")
    again = fetch_model(str(base), tmp_path / "cache", pinned=before.revision)
    assert (again.revision, changed_file(again.path)) == (before.revision, None)


def test_weights_are_hashed_once_for_as_long_as_they_stay(tmp_path, base, monkeypatch):
    monkeypatch.setattr(base_folder, "SETTLED_SECONDS", 0.0)
    first = fetch_model(str(base), tmp_path / "cache")
    hashed = list((tmp_path / "cache" / "hashes").iterdir())
    assert len(hashed) == 1
    hashed[0].write_text("remembered")
    assert fetch_model(str(base), tmp_path / "cache").revision != first.revision


def test_a_file_that_another_takes_the_place_of_is_noticed(tmp_path, base):
    path = fetch_model(str(base), tmp_path / "cache").path
    (base / "model.safetensors").rename(tmp_path / "old")
    (base / "model.safetensors").write_bytes((tmp_path / "old").read_bytes())
    assert changed_file(path) == "model.safetensors"


def test_a_run_of_an_older_version_goes_on_with_its_base(tmp_path, base):
    earlier = base_folder_revision_of_0_1(base)
    assert fetch_model(str(base), tmp_path / "cache", pinned=earlier).revision == earlier
    change(base, "config.json", hidden_size=9)
    with pytest.raises(UserError, match="the run began on"):
        fetch_model(str(base), tmp_path / "cache", pinned=earlier)


def base_folder_revision_of_0_1(folder: Path) -> str:
    from qlora_storage.object_store import sha256_bytes, sha256_file
    from qlora_trainer.storage.model_files import safetensors_header

    lines = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            header = json.dumps(safetensors_header(path), sort_keys=True)
            lines.append(f"{path.name} {path.stat().st_size} {sha256_bytes(header.encode())}")
        else:
            lines.append(f"{path.name} {path.stat().st_size} {sha256_file(path)}")
    return sha256_bytes("\n".join(lines).encode())


# ----------------------------------------------------------------------------------------------------- what is too much


def header_file(path: Path, text: bytes, size: int = 0) -> None:
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(max(size, file.tell()))


def tensors(*places, dtype="F32", shape=(1,)):
    entries = {f"t{n}": {"dtype": dtype, "shape": list(shape), "data_offsets": list(p)} for n, p in enumerate(places)}
    return json.dumps(entries).encode()


LIES = {
    "overlap": tensors((0, 4), (0, 4)),
    "overlap-in-part": tensors((0, 4), (2, 6)),
    "hole": tensors((0, 4), (8, 12)),
    "does-not-begin-at-0": tensors((4, 8)),
    "other-bytes-than-its-shape": tensors((0, 8)),
    "unknown-type": tensors((0, 4), dtype="F33"),
    "type-is-no-name": b'{"t": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
    "negative": tensors((0, -4), shape=(-1,)),
    "no-whole-number": b'{"t": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    "a-truth-value-as-length": b'{"t": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    "twice": b'{"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "t": 1}',
    "product-of-many": tensors((0, 4), shape=(1 << 60,) * 100_000),
    "long-number": b'{"t": {"dtype": "F32", "shape": [' + b"9" * 100_000 + b'], "data_offsets": [0, 4]}}',
    "nested": b'{"t": ' + b"[" * 200_000,
    "no-object": b"[]",
}


@pytest.mark.parametrize("text", LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused(tmp_path, base, text):
    header_file(base / "model.safetensors", text, size=8 + len(text) + 12)
    with pytest.raises(UserError, match=r"model\.safetensors that has a safetensors header that (cannot be read|lies)"):
        fetch_model(str(base), tmp_path / "cache")


def bomb(base: Path, name: str, text: bytes) -> None:
    if name == "model.safetensors":
        header_file(base / name, text)
        return
    (base / "model.safetensors").unlink(missing_ok=name.endswith("index.json"))
    (base / name).write_bytes(text)


def sparse(path: Path, size: int) -> None:
    with path.open("ab") as file:
        file.truncate(size)


BOMBS = {
    "header-of-empty-objects": lambda b: header_file(b / "model.safetensors", b'{"t": [' + b"{}," * 9_000_000),
    "header-of-names": lambda b: header_file(b / "model.safetensors", b"{" + b'"":0,' * 5_000_000 + b'"":0}'),
    "header-longer-than-memory": lambda b: (
        (b / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little")),
        sparse(b / "model.safetensors", 1 << 41),
    ),
    "index-of-millions": lambda b: (
        (b / "model.safetensors").unlink(),
        (b / "model.safetensors.index.json").write_bytes(
            b'{"weight_map": {' + b",".join(b'"%d":"a"' % n for n in range(4_100_000)) + b"}}"
        ),
    ),
    "index-of-gigabytes": lambda b: (
        (b / "model.safetensors").unlink(),
        sparse(b / "model.safetensors.index.json", 1 << 35),
    ),
    "configuration-of-gigabytes": lambda b: sparse(b / "config.json", 1 << 35),
    "configuration-of-lists": lambda b: (b / "config.json").write_bytes(b'{"a": [' + b"[]," * 4_000_000 + b"0]}"),
    "tokenizer-of-gigabytes": lambda b: sparse(b / "tokenizer.json", 1 << 35),
    "template-of-gigabytes": lambda b: sparse(b / "chat_template.jinja", 1 << 35),
}
BOUND_BYTES = 1 << 30
BOUND_CPU_SECONDS = 60
CHILD = """
import resource, sys
from pathlib import Path
from qlora_storage import object_store
from qlora_trainer.errors import UserError
from qlora_trainer.storage.fetch import fetch_model, model_revision
from qlora_trainer.storage.model_files import ModelFilesError
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[3]), int(sys.argv[3])))
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[4]), int(sys.argv[4])))
try:
    fetch_model(sys.argv[1], Path(sys.argv[2]))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_a_file_that_takes_much_to_read_is_refused_within_its_bounds(tmp_path, base, make):
    make(base)
    arguments = [str(base), str(tmp_path / "cache"), str(BOUND_BYTES), str(BOUND_CPU_SECONDS)]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("spec.model.source: "), done.stdout
    assert len(done.stdout) < 1000
