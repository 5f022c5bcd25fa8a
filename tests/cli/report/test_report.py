"""The page of a run: what is on it, from what a run leaves behind, and that it needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from qlora_cli import app
from qlora_cli.report import training_history
from qlora_cli.report.answers import AnswerLine, keep, kept
from qlora_cli.report.charts import MOST_POINTS, Curve, Mark, lines, thinned, ticks

RECEIPT = {
    "dataHash": "a" * 64,
    "trainRows": 1200,
    "trainTokens": 48000,
    "trainTargetTokens": 24000,
    "trainSequences": 100,
    "evalRows": 0,
    "evalTokens": 0,
    "truncated": 0,
    "dropped": 0,
    "fullyMasked": 0,
    "duplicates": 0,
    "evalInTrain": 0,
    "longest": 480,
    "lengths": {"256": 60, "512": 4},
    "packingEfficiency": 0.9,
}
LOG = (
    "2026-01-01 12:00:0{n},123 rank 0 INFO step {n}/4 loss {loss} lr 0.0002 norm 1.5 tokens/s 900\n"
    "2026-01-01 12:00:0{n},223 rank 0 INFO step {n} eval loss {evaluation} perplexity 3\n"
)


@pytest.fixture
def report(workplace):
    def invoke(*arguments):
        done = CliRunner().invoke(app.app, ["report", *arguments])
        assert done.exit_code == 0, done.output
        return (workplace.folder / done.output.strip()).read_text()

    return invoke


class Page(HTMLParser):
    """Tags and what they fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "line", "polyline", "circle", "rect", "br"):
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in ("line", "polyline", "circle", "rect"):
            assert self.open.pop() == tag


def checkpoint(workplace, step, *rows, whole=True):
    folder = workplace.run_folder / "checkpoints" / f"step-{step:08d}"
    (folder / "attempt-1").mkdir(parents=True)
    (folder / "attempt-1" / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if whole:
        (folder / "COMPLETE.json").write_text('{"checkpoint": {"attempt": 1}}')


def step(number, loss, **more):
    return {"step": number, "time": 1.0, "loss": loss, "learningRate": 2e-4, "gradientNorm": 1.0, **more}


def test_a_finished_run_has_every_section(workplace, report):
    assert workplace.run() == 0
    begins = {"attempt": 1, "fromStep": 0, "time": 1.0, "worldSize": 2, "device": "NVIDIA H100 80GB HBM3"}
    spent = {"attempt": 1, "step": 2, "sections": {"Load": 5.0, "Train": 20.0}}
    steps = [step(n, 3.0 - n, tokens=100, seconds=0.5, dataSeconds=0.01) for n in (1, 2)]
    checkpoint(workplace, 2, begins, {"step": 0, "evalLoss": 3.5}, *steps, {"step": 2, "evalLoss": 1.75}, spent)
    page = report("quick")
    for title in ("Curves", "Time", "Memory of a rank", "Attempts", "Data", "Samples", "Configuration", "Environment"):
        assert f"<h2>{title}</h2>" in page
    assert "1.7500" in page
    assert "50.0% lower" in page
    assert "NVIDIA H100 80GB HBM3" in page
    assert "<mark>A small number.</mark>" in page
    assert "microBatchSize: 4" in page


def test_answers_of_base_and_adapter_stand_beside_each_other(workplace, report):
    workplace.run()
    said = {"base": "I <b> know.", "adapter": "Because."}
    checkpoint(workplace, 1, *({"answers": who, "texts": {"Why?": text}} for who, text in said.items()))
    page = report("quick")
    cells = [f"<td><div class=said>{text}</div></td>" for text in ("Why?", "I &lt;b&gt; know.", "Because.")]
    assert "".join(cells) in page.replace(" class=text", "")
    assert "before the first step and after the last" in page


def test_the_environment_of_the_last_attempt_is_on_the_page(workplace, report):
    workplace.run()
    begins = {"attempt": 1, "fromStep": 0, "time": 1.0, "device": "NVIDIA H100 80GB HBM3"}
    found = {
        "torch": "2.15.0",
        "bitsandbytes": "0.50.2",
        "driver": "580.82",
        "cuda": "13.0",
        "gpuMemory": str(80 << 30),
    }
    checkpoint(
        workplace, 1, {**begins, "environment": {"torch": "2.14.0"}}, {**begins, "attempt": 2, "environment": found}
    )
    page = report("quick")
    for name, value in (("Driver", "580.82"), ("CUDA", "13.0"), ("torch", "2.15.0"), ("bitsandbytes", "0.50.2")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    assert "NVIDIA H100 80GB HBM3, 80.00 GiB" in page
    assert "2.14.0" not in page


def test_answers_of_base_and_adapter_are_on_the_page_once_they_were_asked(workplace, report):
    workplace.run()
    assert "qlora generate --run quick" in report("quick")
    keep(
        workplace.run_folder,
        [AnswerLine(prompt="1+1=", base="3", adapter="4"), AnswerLine(prompt="<b>", base="", adapter="y")],
    )
    keep(workplace.run_folder, [AnswerLine(prompt="1+1=", base="3", adapter="2")])
    page = report("quick")
    assert [a.adapter for a in kept(workplace.run_folder)] == ["y", "2"]
    assert "<h2>Base and adapter</h2>" in page
    assert "<div class=said>2</div>" in page
    assert "<div class=said>4</div>" not in page
    assert "&lt;b&gt;" in page
    assert "(nothing)" in page


def test_rows_are_shown_by_their_tokens(workplace, report):
    workplace.run()
    record = json.loads((workplace.run_folder / "run.json").read_text())
    record["receipt"]["lengths"] = {"256": 60, "512": 4}
    (workplace.run_folder / "run.json").write_text(json.dumps(record))
    page = report("quick")
    for text in ("Rows by tokens", "≤ 256", "≤ 512", ">60<", ">4<"):
        assert text in page


def test_the_page_needs_nothing_else_and_runs_nothing(workplace, report):
    workplace.run()
    page = Page(report("quick"))
    assert page.open == []
    assert page.fetched == []
    assert not page.tags & {"script", "link", "img", "iframe"}


def test_what_users_wrote_is_text(workplace, report, helpers):
    workplace.run('dataset.chatTemplate="<script>alert(1)</script>{{ messages }}"')
    page = report("quick")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_run_that_failed_says_why(workplace, report):
    workplace.plan("user-error")
    assert workplace.run() == 40
    page = report("quick")
    assert "Failed: UserError" in page
    assert "matches no layer" in page


def test_a_run_without_a_history_has_the_curves_of_its_logs(workplace, report):
    workplace.run()
    log = workplace.run_folder / "attempt-1" / "log.txt"
    log.write_text("".join(LOG.format(n=n, loss=4.0 - n, evaluation=3.5 - n) for n in (1, 2, 3)))
    page = report("quick")
    assert page.count("<polyline") >= 4
    assert "Gradient norm" in page


def test_a_run_that_never_began_has_a_page(workplace, report):
    workplace.plan(prepare="user-error")
    workplace.run()
    assert "Not started" in report("quick")


def test_the_page_is_where_it_was_asked_for(workplace, report):
    workplace.run()
    assert report("quick") == (workplace.run_folder / "report.html").read_text()
    report("runs/quick", "-o", "elsewhere/page.html")
    assert (workplace.folder / "elsewhere" / "page.html").exists()


def test_a_published_adapter_has_a_page_of_its_own(workplace, report):
    place = workplace.folder / "copied"
    (place / "run-1" / "adapter").mkdir(parents=True)
    manifest = {
        "job": "tune",
        "runUid": "0123456789",
        "created": "2026-01-01T12:00:00Z",
        "base": {"source": "hf://org/base", "revision": "abc"},
        "adapter": "run-1/adapter",
        "files": [{"path": "run-1/adapter/adapter_model.safetensors", "size": 2048, "sha256": "d" * 64}],
        "metrics": {"step": 2, "tokens": 200},
        "packages": {"torch": "2.15.0"},
        "config": {"model": {"source": "hf://org/base"}},
    }
    (place / "manifest.json").write_text(json.dumps(manifest))
    rows = [{"attempt": 1, "fromStep": 0, "time": 1.0, "worldSize": 8}, step(1, 2.0), step(2, 1.5)]
    rows.append({"receipt": RECEIPT, "predicted": {"gradients": 2048}, "measured": {"gradients": 1024}})
    (place / "run-1" / "adapter" / "training_history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page = report("copied")
    for said in (
        "tune",
        "adapter_model.safetensors",
        "2 KiB",
        "2.15.0",
        "hf://org/base",
        "<polyline",
        "48,000",
        "Predicted",
    ):
        assert said in page
    assert report("copied/manifest.json") == page


def test_times_without_a_zone_are_of_utc_to_a_run_that_goes_on_and_to_its_report(workplace, report):
    workplace.plan("silent", "silent")
    workplace.run("policy.maxRestarts=0")
    path = workplace.run_folder / "run.json"
    record = json.loads(path.read_text())
    record["created"] = record["created"].removesuffix("Z")
    record["attempts"][0]["startTime"] = record["attempts"][0]["startTime"].removesuffix("Z")
    path.write_text(json.dumps(record))
    assert "quick" in report("runs/quick")
    workplace.plan("done")
    assert workplace.run() == 0
    assert workplace.record()["attempts"][0]["startTime"].endswith("Z")


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"job": 1}'])
def test_a_file_that_is_no_manifest_is_said_to_be_none(workplace, content):
    (workplace.folder / "manifest.json").write_text(content)
    done = CliRunner().invoke(app.app, ["report", "."])
    assert done.exit_code == 40
    assert "is no manifest of an adapter" in done.output


def test_an_unknown_run_is_answered_with_those_there_are(workplace):
    workplace.run()
    done = CliRunner().invoke(app.app, ["report", "quack"])
    assert done.exit_code == 40
    assert "there are quick" in done.output


# ------------------------------------------------------------------------------------------------------------- history


def test_a_broken_checkpoint_and_broken_lines_are_passed_over(workplace):
    workplace.run_folder.mkdir(parents=True)
    checkpoint(workplace, 1, step(1, 2.0))
    checkpoint(workplace, 2, step(1, 2.0), step(2, 9.0), whole=False)
    assert set(training_history.of_run(workplace.run_folder).steps) == {1}
    found = training_history.parse(
        ['{"step": 1, "loss": 2.0}', "", "{", '{"step": "x", "loss": 1}', "[]", '{"step": 2}']
    )
    assert set(found.steps) == {1}


def test_logs_tell_only_of_steps_after_the_last_checkpoint(tmp_path):
    log = tmp_path / "attempt-1" / "log.txt"
    log.parent.mkdir()
    log.write_text("".join(LOG.format(n=n, loss=9.0, evaluation=8.0) for n in (1, 2, 3)))
    known = training_history.parse([json.dumps(step(n, 1.0)) for n in (1, 2)] + ['{"step": 2, "evalLoss": 1.5}'])
    found = training_history.with_logs(known, [log])
    assert {n: s.loss for n, s in found.steps.items()} == {1: 1.0, 2: 1.0, 3: 9.0}
    assert found.evaluations == {1: 8.0, 2: 1.5, 3: 8.0}


def test_a_loss_that_is_not_finite_is_a_gap():
    found = training_history.parse(['{"step": 1, "loss": null}', '{"step": 2, "loss": 1.0, "gradientNorm": null}'])
    assert [s.loss for s in found.steps.values()] == [None, 1.0]


# -------------------------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        pytest.param(0, 10, [0, 2, 4, 6, 8, 10], id="tens"),
        pytest.param(0, 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5], id="tenths"),
        pytest.param(2, 2, [2], id="one-value"),
        pytest.param(0, 206, [0, 50, 100, 150, 200], id="steps"),
    ],
)
def test_ticks_are_round(low, high, want):
    assert ticks(low, high) == pytest.approx(want)


def test_long_curves_are_drawn_as_means_of_neighbours():
    points = thinned([(float(n), float(n % 2)) for n in range(10 * MOST_POINTS)])
    assert len(points) <= MOST_POINTS
    assert all(0.4 < y < 0.6 for _, y in points)


def test_every_point_lies_within_the_picture():
    text = lines("t", [Curve("a", [(1, -3.0), (2, 1e6), (3, 7.0)])], y_text=str, marks=[Mark(2, "attempt 2")])
    numbers = [float(n) for pair in re.search(r'points="([^"]+)"', text)[1].split() for n in pair.split(",")]
    assert all(0 <= x <= 560 for x in numbers[::2])
    assert all(0 <= y <= 240 for y in numbers[1::2])
    assert "attempt 2" in text


def test_nothing_to_draw_is_no_figure():
    assert lines("t", [Curve("a", [])], y_text=str) == ""


def test_trainer_and_report_name_the_files_alike():
    history = pytest.importorskip("qlora_trainer.reporting.training_history")
    assert (history.HISTORY_FILE, history.PUBLISHED_FILE) == (
        training_history.CHECKPOINT_FILE,
        training_history.PUBLISHED_FILE,
    )


def test_the_report_reads_what_the_trainer_writes():
    history = pytest.importorskip("qlora_trainer.reporting.training_history").TrainingHistory()
    history.attempt(1, 0, worldSize=2, device="CPU")
    history.evaluation(0, 3.5)
    history.step(1, loss=3.0, learningRate=1e-4, gradientNorm=float("inf"), tokens=100, seconds=0.5, dataSeconds=0.1)
    history.sections(1, 1, {"Train": 1.5})
    history.end({"trainRows": 5, "samples": ["a secret row"]}, {"peak": 2}, {"peak": 1})
    assert b"secret" not in history.to_bytes()
    found = training_history.parse(history.to_bytes().decode().splitlines())
    assert found.attempts[1].world_size == 2
    assert found.evaluations == {0: 3.5}
    assert found.steps[1].tokens_per_second == 200
    assert found.steps[1].gradient_norm is None
    assert found.section_seconds == {"Train": 1.5}
    assert found.end == {"receipt": {"trainRows": 5}, "predicted": {"peak": 2}, "measured": {"peak": 1}}
