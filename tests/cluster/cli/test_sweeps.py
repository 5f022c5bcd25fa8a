"""A sweep by the command line on a real control plane, from submit to report."""

from __future__ import annotations

import json

import pytest

from cluster.scenarios.jobs import GROUP, in_state
from cluster.scenarios.script import pods_do
from cluster.scenarios.sweeps import SWEEP, qlora_sweep, sweep_path, trials_pause_first, trials_succeed
from cluster.scenarios.whole_life import word

HALVING = {"minSteps": 2, "reductionFactor": 4}
STOPS = {"stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped at step 5")}
LONG = 90


@pytest.fixture
def sweep_file(qlora):
    """Write a sweep's manifest; its file's name."""

    def write(name=SWEEP, **spec):
        body = qlora_sweep(qlora.namespace, name, **spec)
        del body["metadata"]["namespace"]
        (qlora.folder / f"{name}.yaml").write_text(f"{json.dumps(body)}\n")
        return f"{name}.yaml"

    return write


@pytest.fixture
def _gone(qlora, api):
    """Leave no sweep to the next test."""
    yield
    api.delete(sweep_path(qlora.namespace))
    jobs = f"{GROUP}/namespaces/{qlora.namespace}/qlorajobs"
    api.wait_for(jobs, lambda found: not any("ownerReferences" in j["metadata"] for j in found["items"]), seconds=LONG)


@pytest.mark.usefixtures("_gone")
def test_a_sweep_from_submit_to_its_report(qlora, sweep_file, api):
    with trials_succeed(api, qlora.namespace):
        sent = qlora("submit", sweep_file(), "--set", "parallelTrials=1", "--watch")
    assert sent.code == 0, sent.err
    lines = sent.out.splitlines()
    assert lines[0] == "qlorasweep.qlora.dev/search created"
    assert any(line.startswith("search-3  Succeeded (Completed)  step 10/10") for line in lines)
    last = next(line for line in reversed(lines) if line.startswith("sweep"))
    assert last.startswith(
        "sweep search  Succeeded (Completed)  trials 4/4  best search-2 EvalLoss 1.1000  GPU-hours 0"
    )
    assert f"Next: qlora report search -n {qlora.namespace}" in sent.err
    assert f"qlora download search-2 -n {qlora.namespace}" in sent.err
    assert api.get(sweep_path(qlora.namespace))["spec"]["parallelTrials"] == 1

    page = qlora("show", "search").out
    assert page.splitlines()[0] == f"sweep {qlora.namespace}/search  Succeeded (Completed)"
    for part in ("4 of 4 have ended; 4 succeeded", "lora.rank 8, 16; training.learningRate 1e-4, 3e-4", "search-2 *"):
        assert part in page
    assert qlora("show", "qlorasweep/search", "-o", "json").json["kind"] == "QLoRASweep"

    report = qlora("report", "search")
    assert report.code == 0, report.err
    assert report.out.splitlines()[-2:] == ["search-report.html", "search-report.json"]
    figures = json.loads((qlora.folder / "search-report.json").read_text())
    assert figures["best"] == "search-2"
    assert figures["compared"] == {"search-0": 1.5, "search-1": 1.2, "search-2": 1.1, "search-3": 1.4}
    assert [each["importance"] > 0 for each in figures["parameters"]] == [True, True]
    assert (qlora.folder / "search-report.html").read_text().count("<polyline") == 4


@pytest.mark.usefixtures("_gone")
def test_with_early_stopping_the_report_compares_all_trials_at_the_first_comparison(qlora, sweep_file, api):
    with trials_pause_first(api, qlora.namespace):
        qlora("submit", sweep_file(earlyStopping=HALVING))
        api.wait_for(sweep_path(qlora.namespace), in_state("Succeeded"), seconds=LONG)
    assert qlora("report", "qlorasweep/search", "-o", "out/page.html").code == 0
    figures = json.loads((qlora.folder / "out" / "page.json").read_text())
    assert figures["comparedAtStep"] == 2
    assert figures["compared"] == {"search-0": 1.5, "search-1": 1.2, "search-2": 1.1, "search-3": 1.4}
    assert figures["steps"] == 2 * 3 + 10


@pytest.mark.usefixtures("_gone")
def test_a_sweep_is_listed_suspended_resumed_and_cancelled(qlora, sweep_file, api):
    path = sweep_path(qlora.namespace)
    with pods_do(api, qlora.namespace, STOPS):
        qlora("submit", sweep_file())
        api.wait_for(path, in_state("Running"), seconds=LONG)
        listed = qlora("list")
        jobs, sweeps = listed.out.split("\n\n")
        assert {row.split()[0] for row in jobs.splitlines()[1:]} >= {"search-0", "search-1"}
        head, row = sweeps.splitlines()
        assert head.split() == ["SWEEP", "STATE", "REASON", "TRIALS", "RUN", "GPU-HOURS", "AGE"]
        assert row.split()[:5] == ["search", "Running", "Searching", "0/4", "2"]
        assert "qlora show qlorasweep/search" in listed.err
        assert qlora("list", "--sweeps", "-o", "name").out == "qlorasweep.qlora.dev/search\n"
        assert [o["kind"] for o in qlora("list", "--sweeps", "-o", "json").json["items"]] == ["QLoRASweep"]
        assert "search\n" not in qlora("list", "-o", "name").out

        trial = qlora("suspend", "search-0")
        assert trial.code == 40
        assert 'job "search-0" is a trial of sweep "search", which suspends and resumes it' in trial.err
        assert qlora("suspend", "search").out == "qlorasweep.qlora.dev/search suspended\n"
        api.wait_for(path, in_state("Suspended"), seconds=LONG)
        assert qlora("suspend", "search").out == ("qlorasweep.qlora.dev/search unchanged, it is suspended already\n")
        assert "Next: qlora resume search" in qlora("show", "search").err
        assert qlora("resume", "qlorasweep/search").out == "qlorasweep.qlora.dev/search resumed\n"
        api.wait_for(path, in_state("Running"), seconds=LONG)
    refused = qlora("cancel", "search")
    assert refused.code == 40
    assert f"{qlora.namespace}/search  sweep, Running; its trials are deleted with it" in refused.err
    assert qlora("cancel", "search", "--yes").out == "qlorasweep.qlora.dev/search deleted\n"
    api.wait_gone(path)
    qlora("submit", sweep_file(suspend=True))


@pytest.mark.usefixtures("_gone")
def test_a_job_of_a_sweeps_name_comes_first(qlora, sweep_file, manifest):
    qlora("submit", manifest(SWEEP, suspend=True))
    taken = qlora("submit", sweep_file(suspend=True))
    assert taken.out == "qlorasweep.qlora.dev/search created\n"
    assert qlora("show", SWEEP, "-o", "json").json["kind"] == "QLoRAJob"
    assert qlora("show", "qlorasweep.qlora.dev/search", "-o", "json").json["kind"] == "QLoRASweep"
    assert qlora("cancel", SWEEP, "--yes").out == "qlorajob.qlora.dev/search deleted\n"
    again = qlora("submit", sweep_file(suspend=True))
    assert again.code == 40
    assert again.err.startswith(f'metadata.name: "search" is taken in namespace {qlora.namespace} by a sweep;')


def test_a_sweep_that_is_not_there(qlora):
    for command in (("show",), ("watch",), ("suspend",), ("cancel", "--yes"), ("report",)):
        said = qlora(*command, "qlorasweep/nobody")
        assert (said.code, said.err.partition(";")[0]) == (40, f'no sweep "nobody" in namespace {qlora.namespace}'), (
            command
        )


def test_both_documents_of_a_file_are_created_and_checked_by_the_server(qlora, sweep_file, manifest):
    both = qlora.folder / "both.yaml"
    one, other = qlora.folder / sweep_file(), qlora.folder / manifest("beside")
    both.write_text(f"{one.read_text()}---\n{other.read_text()}")
    sent = qlora("submit", "both.yaml", "--dry-run", "server")
    assert sent.out.splitlines() == [
        "qlorajob.qlora.dev/beside valid (dry run by the server)",
        "qlorasweep.qlora.dev/search valid (dry run by the server)",
    ]
    watched = qlora("submit", "both.yaml", "--watch")
    assert watched.code == 2
    assert "follows jobs, or one sweep" in " ".join(watched.err.split())
