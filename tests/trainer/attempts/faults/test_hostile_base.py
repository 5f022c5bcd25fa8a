"""A base of somebody who wants other files loaded than those that were checked, or changes them meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from qlora_api.contract import ExitCode
from testing.opened_files import opened_files
from testing.ports import free_port

CHECKED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
PROGRAM = """
import os, runpy, sys
watched, log, module = sys.argv[1], open(sys.argv[2], "a"), sys.argv[3]
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)) and os.fsdecode(arguments[0]).startswith(watched):
        log.write(os.fsdecode(arguments[0]) + "\\n")
        log.flush()
sys.addaudithook(note)
sys.argv = [module, sys.argv[4]]
runpy.run_module(module, run_name="__main__")
"""


def hostile(runner):
    """A copy of the base with everything beside it, and in it, that a library might follow."""
    base = shutil.copytree(runner.model, runner.folder / "hostile" / "base")
    other = shutil.copytree(runner.model, runner.folder / "hostile" / "elsewhere")
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "training_args.bin", "modeling_x.py"):
        (base / name).write_bytes(b"\x80\x04.")
    for name in ("other.safetensors", "adapter_model.safetensors"):
        shutil.copy(base / "model.safetensors", base / name)
    for folder in ("additional_chat_templates", "custom_generate", "original"):
        (base / folder).mkdir()
    (base / "additional_chat_templates" / "default.jinja").write_text("{{ 1 }}")
    (base / "custom_generate" / "generate.py").write_text("raise SystemExit('ran')")
    shutil.copy(other / "tokenizer.json", base / "tokenizer.5.0.0.json")
    change(base / "config.json", attn_implementation="someone/kernel", gguf_file=str(other / "x.gguf"))
    change(
        base / "tokenizer_config.json",
        fast_tokenizer_files=["tokenizer.5.0.0.json"],
        vocab_file=str(other / "tokenizer.json"),
        name_or_path=str(other),
    )
    (base / "special_tokens_map.json").write_text(json.dumps({"tokenizer_file": str(other / "tokenizer.json")}))
    return base, other


def change(file, **keys):
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.ranks
def test_prepare_and_a_rank_open_of_a_base_what_was_checked_and_nothing_else(runner):
    base, other = hostile(runner)
    config = runner.config(
        ranks=1,
        model={"source": str(base)},
        training={"epochs": None, "maxSteps": 1, "microBatchSize": 4},
        output={"destination": str(runner.folder / "out"), "merge": "BFloat16", "allowWorseEval": True},
    )
    path, log = runner.write(config)
    audit = runner.folder / "audit.txt"
    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = os.environ | {name: str(value) for name, value in world.items()}
    with opened_files(base, other, *(p for p in base.iterdir() if p.is_dir())) as opened, log.open("ab") as out:
        for module in ("qlora_trainer.prepare", "qlora_trainer.rank"):
            command = [sys.executable, "-c", PROGRAM, str(base.parent), str(audit), module, str(path)]
            code = subprocess.run(command, env=environment, stdout=out, stderr=out, check=False).returncode
            assert code == ExitCode.DONE, log.read_text()[-3000:]
        names = {os.path.relpath(name, base) for name in opened()}
    assert names <= CHECKED | {"special_tokens_map.json"}
    assert {os.path.relpath(name, base) for name in audit.read_text().split()} <= {".", *names}
    assert "model.safetensors" in names, "the watch works"


def flip(path):
    """Change one byte of a file's data, with its size and times as before."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.ranks
@pytest.mark.parametrize("cache", ["kept", "lost"])
def test_a_run_does_not_go_on_from_a_base_of_which_one_byte_was_changed(runner, cache):
    model = shutil.copytree(runner.model, runner.folder / "model")
    changes = {"model": {"source": str(model)}, "training": {"epochs": None, "maxSteps": 2}}
    assert runner.run(runner.config(ranks=1, **changes)).code == ExitCode.DONE
    shutil.rmtree(runner.folder / "out")
    flip(model / "model.safetensors")
    if cache == "lost":
        shutil.rmtree(runner.cache)
    ended = runner.run(runner.config(ranks=1, attempt=2, **changes))
    assert ended.code == ExitCode.USER_ERROR
    assert ended.text.startswith("spec.model.source: ")
    assert "the run began on" in ended.text
    assert not (runner.folder / "out" / "manifest.json").exists()


@pytest.mark.ranks
def test_nothing_is_published_of_an_attempt_whose_base_was_changed_meanwhile(runner):
    model = shutil.copytree(runner.model, runner.folder / "model")
    changes = {"model": {"source": str(model)}, "training": {"epochs": None, "maxSteps": 2}}
    config = runner.config(ranks=1, **changes)
    assert runner.prepare(config) == ExitCode.DONE
    flip(model / "model.safetensors")
    ended = runner.train(config)
    assert ended.code == ExitCode.USER_ERROR
    assert "model.safetensors that was changed while the job used it" in ended.text
    assert not (runner.folder / "out" / "manifest.json").exists()
