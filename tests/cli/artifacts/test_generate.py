"""Asking base, adapter and merged model."""

import io
import json
import sys

import pytest
from rich.console import Console

from qlora_cli.artifacts import generate as asking
from qlora_cli.artifacts.generate import GenerateError, GenerateOptions, Models
from qlora_cli.local.trainer_process import Commands
from qlora_cli.report.answers import AnswerLine, keep, kept

ANSWERS = """
import json, sys
print("a library says something")
for word in sys.argv[1:]:
    if word.startswith("--prompt="):
        print(json.dumps({"prompt": word[9:], "base": "I do not know [/b].", "adapter": " ".join(sys.argv[1:])}))
sys.exit(0)
"""
PREPARED = {
    "dataHash": "d",
    "trainRows": 1,
    "trainTokens": 1,
    "trainSequences": 1,
    "gradientCheckpointing": False,
    "batch": {"worldSize": 2, "microBatchSize": 4, "gradientAccumulationSteps": 2},
}
TWO_MODELS = Models("base", "adapter")
FAILS = "import sys; print('ValueError: no such folder', file=sys.stderr); sys.exit(3)"


def ask(program, models=TWO_MODELS, folder=None):
    options = GenerateOptions(("--what?", "two"), 9, sample=True)
    console = Console(file=io.StringIO(), width=120, markup=False, emoji=False, highlight=False)
    code = asking.generate(models, options, console, Commands(generate=(sys.executable, "-c", program)), folder)
    return code, console.file.getvalue()


def test_answers_are_kept_beside_the_run(tmp_path):
    ask(ANSWERS, folder=tmp_path)
    ask(FAILS, folder=tmp_path)
    assert [(a.prompt, a.base, a.merged) for a in kept(tmp_path)] == [
        ("--what?", "I do not know [/b].", None),
        ("two", "I do not know [/b].", None),
    ]


def test_answers_for_which_there_is_no_room_leave_those_that_were_kept(tmpfs):
    with tmpfs("size=64k") as folder:
        ask(ANSWERS, folder=folder)
        before = (folder / "answers.jsonl").read_bytes()
        (folder / "other").write_bytes(bytes(60_000))
        with pytest.raises(OSError, match="No space left on device"):
            keep(folder, [AnswerLine(prompt="three", base="x" * 10_000)])
        assert (folder / "answers.jsonl").read_bytes() == before
        assert {path.name for path in folder.iterdir()} == {"answers.jsonl", "other"}


def test_answers_stand_side_by_side():
    code, said = ask(ANSWERS, Models("base", "adapter", "merged"))
    assert code == 0
    for part in ("--what?", "I do not know [/b].", "--base=base", "--merged=merged", "--max-new-tokens=9", "--sample"):
        assert part in said
    assert "a library says" not in said


def test_a_failure_shows_the_end_of_the_errors():
    code, said = ask(FAILS)
    assert code == 3
    assert "ValueError: no such folder" in said


def test_a_run_names_base_and_adapter(workplace):
    workplace.run()
    models = asking.choose_models(None, "quick", workplace.folder / "runs", None, None)
    assert (models.base, models.adapter) == (str(workplace.folder / "model"), str(workplace.folder / "out"))
    assert json.loads(models.dataset)["format"] == "Messages"


def test_a_run_that_merged_has_a_merged_model_too(workplace):
    workplace.run()
    (workplace.folder / "merged").mkdir()
    models = asking.choose_models(None, "quick", workplace.folder / "runs", None, None)
    assert models.merged == str(workplace.folder / "merged")


def test_an_adapter_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/b"}))
    assert asking.choose_models(str(tmp_path), None, tmp_path, None, None).base == "/models/b"
    assert asking.choose_models(str(tmp_path), None, tmp_path, "/other", None).base == "/other"


@pytest.mark.parametrize("published", [True, False])
def test_an_adapter_with_a_manifest_is_asked_on_the_base_it_was_trained_on(tmp_path, published):
    adapter = tmp_path / "3f2a-attempt-1" / "adapter" if published else tmp_path / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    named = {"source": "hf://org/base@main", "revision": "c" * 40}
    manifest = {"adapter": "3f2a-attempt-1/adapter", "base": named, "config": {"dataset": {"format": "Text"}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    models = asking.choose_models(str(adapter), None, tmp_path, None, None)
    assert (models.base, models.revision, models.dataset) == ("hf://org/base@main", "c" * 40, '{"format": "Text"}')
    options = GenerateOptions(("Hello",), 9, sample=False)
    assert f"--revision={'c' * 40}" in asking.command(["ask"], models, options)
    other = asking.choose_models(str(adapter), None, tmp_path, "/other", None)
    assert (other.base, other.revision) == ("/other", "")
    assert not any(word.startswith("--revision") for word in asking.command(["ask"], other, options))


def test_a_run_is_asked_on_the_base_it_was_trained_on(workplace):
    workplace.run()
    record = workplace.record()
    record["prepared"] = {**PREPARED, "modelRevision": "c" * 40}
    (workplace.run_folder / "run.json").write_text(json.dumps(record))
    models = asking.choose_models(None, "quick", workplace.folder / "runs", None, None)
    assert models.revision == "c" * 40
    assert asking.choose_models(None, "quick", workplace.folder / "runs", "/other", None).revision == ""


def test_an_adapter_beside_its_manifest_is_asked_as_it_was_taught(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"config": {"dataset": {"format": "Messages"}}}))
    models = asking.choose_models(str(tmp_path / "adapter"), None, tmp_path, "/b", None)
    framed = asking.command(["ask"], models, GenerateOptions(("Hello",), 9, sample=False))
    assert '--dataset={"format": "Messages"}' in framed
    raw = asking.command(["ask"], models, GenerateOptions(("Hello",), 9, sample=False, raw=True))
    assert not any(word.startswith("--dataset") for word in raw)


@pytest.mark.parametrize("conversations", [True, False])
def test_an_adapter_that_learned_from_conversations_is_asked_with_the_chat_template(tmp_path, conversations):
    (tmp_path / "manifest.json").write_text(json.dumps({"config": {"dataset": {"format": "PromptCompletion"}}}))
    (tmp_path / "adapter").mkdir()
    last = {"receipt": {"conversations": conversations}, "predicted": {}, "measured": {}}
    (tmp_path / "adapter" / "training_history.jsonl").write_text(json.dumps(last) + "\n")
    models = asking.choose_models(str(tmp_path / "adapter"), None, tmp_path, "/b", None)
    asked = asking.command(["ask"], models, GenerateOptions(("Hello",), 9, sample=False))
    assert ("--conversations" in asked) == conversations


def test_prompts_come_from_the_command_line_and_a_file(tmp_path):
    (tmp_path / "prompts").write_text("two\n\nthree\n")
    assert asking.prompts(["one"], tmp_path / "prompts") == ("one", "two", "three")


@pytest.mark.parametrize(
    ("adapter", "run", "message"),
    [
        pytest.param(None, None, "give one of", id="neither"),
        pytest.param("a", "b", "give one of", id="both"),
        pytest.param(None, "other", "there are quick", id="unknown-run"),
        pytest.param(None, "quick", "no adapter yet", id="unfinished-run"),
        pytest.param("nowhere", None, "--base", id="adapter-without-config"),
    ],
)
def test_what_cannot_be_asked(workplace, adapter, run, message):
    workplace.plan("user-error")
    workplace.run()
    with pytest.raises(GenerateError, match=message):
        asking.choose_models(adapter, run, workplace.folder / "runs", None, None)


def test_no_prompt_is_a_error():
    with pytest.raises(GenerateError, match="--prompt"):
        asking.prompts([], None)
