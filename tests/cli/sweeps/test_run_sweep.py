"""'qlora sweep', with a real process in the trainer's place: its trials, its end, and what a crash costs."""

import itertools
import json
import os
import shutil
import signal
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from qlora_api.contract import JobRef
from qlora_api.errors import FieldError, ManifestError
from qlora_api.status import Reason
from qlora_cli.local import attempt_loop, run_folder
from qlora_cli.local.run_folder import RunError
from qlora_cli.local.trainer_process import StopRequests
from qlora_cli.manifest.job_manifest import RefusedError
from qlora_cli.sweeps import run_sweep as module
from qlora_cli.sweeps import sweep_folder
from qlora_storage.destination_claim import claim_destination
from testing.timeouts import PATIENCE_SECONDS

HALVING = {"minSteps": 4, "reductionFactor": 2}


@pytest.fixture
def place(sweep_place):
    return sweep_place


def test_a_grid_runs_each_combination_and_its_result_names_the_best_adapter(place):
    assert place.run() == 0, place.said
    result = place.result()
    assert [trial["parameters"] for trial in result["trials"]] == [
        {"lora.rank": rank, "training.learningRate": rate} for rank in ("8", "16") for rate in ("1e-4", "1e-3")
    ]
    assert {trial["state"] for trial in result["trials"]} == {"Succeeded"}
    best = result["best"]
    assert (best["name"], best["value"]) == ("search-3", "1.05")
    assert best["adapter"]["uri"] == str(place.folder / "out/trials/search-3")
    assert best["adapter"]["manifestSha256"] == "b" * 64
    assert result["uid"] == json.loads((place.runs / "sweep.json").read_text())["uid"]
    for expected in (
        "lora.rank 8, 16; training.learningRate 1e-4, 1e-3",
        "Trial 0 (1 of 4): lora.rank 8, training.learningRate 1e-4; to the end",
        "best of 4 trials: search-3, EvalLoss 1.05, lora.rank 16, training.learningRate 1e-3",
        str(place.folder / "out/sweep.json"),
        "80 of all trials together",
        f"qlora generate --run search-3 --runs-dir {place.runs / 'trials'}",
    ):
        assert expected in place.said, place.said


def test_a_sweep_that_is_over_runs_nothing_again(place):
    place.run()
    before = (place.folder / "out" / "sweep.json").read_bytes()
    assert place.run() == 0
    assert "Trial 0 (" not in place.said
    assert (place.folder / "out" / "sweep.json").read_bytes() == before
    place.write(maxFailedTrials=0)
    assert place.run() == 0
    assert place.result()["spec"]["maxFailedTrials"] == 0


def test_a_sweep_whose_best_adapter_is_gone_is_not_called_done(place):
    place.run()
    shutil.rmtree(place.folder / "out" / "trials" / "search-3")
    with pytest.raises(RunError, match=r"run search-3 was done, but .*manifest.json is gone; train it again with"):
        place.run()
    assert "qlora generate" not in place.said


def test_trials_are_suspended_and_the_best_resume_from_their_checkpoints(place):
    place.write(earlyStopping=HALVING)
    assert place.run() == 0, place.said
    assert [place.steps(number) for number in (0, 1, 2, 3)] == [
        [*range(1, 5)],
        [*range(1, 9)],  # to the second comparison, without a step taken twice
        [*range(1, 5)],
        [*range(1, 21)],
    ]
    attempts = place.trial(3)["attempts"]
    assert [attempt["reason"] for attempt in attempts] == ["Suspended", "Suspended", "Completed"]
    # none of them lived long enough to be asked for its progress
    assert [(attempt["firstStep"], attempt["lastStep"]) for attempt in attempts] == [(0, 4), (4, 8), (8, 20)]
    assert [trial["state"] for trial in place.result()["trials"]] == ["Suspended"] * 3 + ["Succeeded"]
    assert "from step 4 to step 8" in place.said
    assert "from step 8 to the end" in place.said


class CrashError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("algorithm", ["Grid", "TPE"])
def test_crashes_at_writes_change_nothing_in_the_end(place, monkeypatch, algorithm):
    """The first call ends at its first write, the second at its second one, and so on until a call ends by itself."""
    place.write(earlyStopping=HALVING, algorithm={"type": algorithm})
    assert place.run() == 0, place.said
    expected = place.outcome()
    shutil.rmtree(place.folder / "runs")
    shutil.rmtree(place.folder / "out")
    whole = run_folder.write_whole
    crashes = 0
    while True:
        writes = iter(range(crashes))

        def write_whole(*arguments, writes=writes, **options):
            if next(writes, None) is None:
                raise CrashError
            whole(*arguments, **options)

        for writer in (run_folder, sweep_folder):
            monkeypatch.setattr(writer, "write_whole", write_whole)
        try:
            code = place.run()
        except CrashError:
            crashes += 1
            continue
        break
    assert code == 0, place.said
    assert crashes > 10
    assert place.outcome() == expected
    assert all(len(set(place.steps(n))) == len(place.steps(n)) for n in range(4)), "a step was taken twice"


def test_ctrl_c_stops_a_trial_and_the_same_command_goes_on(place, helpers):
    place.run()
    expected = place.outcome()
    (place.folder / "runs").rename(place.folder / "earlier")
    (place.folder / "out").rename(place.folder / "earlier-out")
    place.workplace.plan("wait")
    process = place.start()
    port = place.runs / "trials" / "search-0" / "attempt-1" / "rank-0.port"
    helpers.wait_until(port.exists)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=PATIENCE_SECONDS)[0]
    assert process.returncode == 130, said
    assert "The same command resumes this sweep." in said
    assert place.trial(0)["attempts"][0]["reason"] == "Preempted"
    place.plan()
    assert place.run() == 0, place.said
    assert place.steps(0) == [*range(8, 21)]  # its checkpoint was at step 7
    assert place.outcome() == expected


def test_a_sweep_that_was_killed_goes_on(place, helpers):
    place.workplace.plan("wait")
    process = place.start()
    helpers.wait_until((place.runs / "trials" / "search-0" / "attempt-1" / "rank-0.port").exists)
    process.kill()
    process.communicate(timeout=PATIENCE_SECONDS)
    with pytest.raises(
        RunError, match=r"search-0 is in use by process \d+; 'kill \d+' stops it with a checkpoint"
    ) as at:
        place.run()
    trainer = int(str(at.value).split("process ")[1].split(";")[0])
    os.kill(trainer, signal.SIGTERM)
    helpers.wait_until(lambda: not helpers.lives(trainer))
    place.plan()
    assert place.run() == 0, place.said
    assert place.steps(0) == [*range(8, 21)]


def test_the_budget_stops_the_sweep_and_a_larger_one_goes_on(place):
    place.plan(seconds=0.6)
    place.write(budgetGpuHours="0.0005")  # 1.8 seconds of two ranks
    assert place.run() == 43, place.said
    assert "of 0.0005 CPU-rank-hours. With a larger spec.budgetGpuHours the same command resumes" in place.said
    assert not (place.folder / "out" / "sweep.json").exists()
    place.plan()
    place.write(budgetGpuHours="1")
    assert place.run() == 0, place.said
    assert len(place.result()["trials"]) == 4


def test_waits_between_attempts_take_nothing_of_the_budget(place, monkeypatch):
    place.workplace.plan("crash", "learn")
    place.write(budgetGpuHours="1")  # half an hour of two ranks
    monotonic, waited = time.monotonic, []
    monkeypatch.setattr(StopRequests, "wait", lambda _, seconds: waited.append(seconds * 3600))
    monkeypatch.setattr(attempt_loop, "time", SimpleNamespace(monotonic=lambda: monotonic() + sum(waited)))
    assert place.run() == 0, place.said
    assert len(waited) == 4
    assert {trial["state"] for trial in place.result()["trials"]} == {"Succeeded"}


def test_a_crash_at_the_end_of_the_budget_is_followed_by_no_wait_and_no_attempt(place, monkeypatch):
    place.workplace.plan("crash")
    place.write(budgetGpuHours="1")
    days, waited = itertools.count(1), []
    monkeypatch.setattr(attempt_loop.run_folder, "now", lambda: datetime(2026, 1, next(days), tzinfo=UTC))
    monkeypatch.setattr(StopRequests, "wait", lambda _, seconds: waited.append(seconds))
    assert place.run() == 43, place.said
    assert (waited, len(place.trial(0)["attempts"])) == ([], 1)
    assert "of 1 CPU-rank-hours. With a larger spec.budgetGpuHours the same command resumes" in place.said


def test_a_trial_that_fails_does_not_end_the_sweep(place):
    place.plan(failingRanks=[16])
    assert place.run() == 0, place.said
    assert [trial["state"] for trial in place.result()["trials"]] == ["Succeeded"] * 2 + ["Failed"] * 2
    assert place.result()["trials"][2]["message"] == 'spec.lora.targetModules: "q_prj" matches no layer'
    assert place.result()["best"]["number"] == 1


def test_too_many_failures_end_the_sweep_with_the_reason(place):
    place.plan(failingRanks=[8, 16])
    place.write(maxFailedTrials=1)
    assert place.run() == 1
    assert "2 trials failed (spec.maxFailedTrials: 1); the last: search-1: spec.lora.targetModules" in place.said
    assert not (place.folder / "out" / "sweep.json").exists()


def test_another_spec_is_refused_and_fresh_starts_anew(place):
    place.run()
    uid = place.result()["uid"]
    place.write(job={"output": {"destination": "elsewhere"}}, parameters=[{"path": "lora.rank", "choices": [8, 32]}])
    with pytest.raises(
        RunError, match=r"(?s)holds a sweep of another spec.*\n  spec.parameters: .*\nUse another metadata"
    ):
        place.run()
    first = json.loads((place.runs / "trials" / "search-1" / "run.json").read_text())
    claim_destination(first["spec"]["output"]["destination"], JobRef(name="search-1", uid=first["uid"]))
    assert place.run(fresh=True) == 0, place.said
    claim_destination(first["spec"]["output"]["destination"], JobRef(name="search-1", uid="1111-next"))
    assert json.loads((place.folder / "elsewhere" / "sweep.json").read_text())["uid"] != uid
    assert not (place.folder / "out" / "sweep.json").exists()
    assert not list((place.folder / "out" / "trials").glob("*/manifest.json"))  # of all four trials
    assert json.loads((place.folder / "out" / f"sweep-{uid[:8]}.json").read_text())["uid"] == uid
    assert "The folder of an earlier sweep is now" in place.said


@pytest.mark.parametrize("fresh", [False, True])
def test_a_sweep_and_a_run_of_one_name_leave_each_other_alone(place, fresh):
    assert place.run() == 0
    with pytest.raises(RunError, match=r"runs/search holds a sweep of this name: use another metadata.name"):
        place.workplace.run(name="search", fresh=fresh)
    assert (place.runs / "sweep.json").exists()
    shutil.rmtree(place.runs)
    shutil.rmtree(place.folder / "out")
    assert place.workplace.run(name="search") == 0
    with pytest.raises(RunError, match=r"runs/search holds the run of a job of this name: use another metadata.name"):
        place.run(fresh=fresh)
    assert (place.runs / "run.json").exists()


def test_trials_beyond_a_lowered_limit_are_counted_and_may_be_the_best(place):
    place.write(algorithm={"type": "Random"}, maxTrials=4)
    assert place.run() == 0, place.said
    record = sweep_folder.SweepFolder(place.runs).read()
    lowered = record.spec.model_copy(update={"max_trials": 2})
    trials = sweep_folder.read_trials(sweep_folder.SweepFolder(place.runs), lowered)
    assert [trial.number for trial in trials] == [0, 1, 2, 3]


def test_a_folder_whose_number_is_written_in_another_way_is_no_trial(place):
    assert place.run() == 0, place.said
    folder = sweep_folder.SweepFolder(place.runs)
    for copy in ("search-01", "search-٢", "search-1.old", "search-"):
        shutil.copytree(folder.trial(1).path, folder.trials / copy)
    assert [number for number, _, _ in folder.runs()] == [0, 1, 2, 3]


def test_a_trial_without_the_checkpoint_of_its_pause_is_resumed_and_not_compared(place):
    place.write(earlyStopping=HALVING)
    assert place.run() == 0, place.said
    run = sweep_folder.SweepFolder(place.runs).trial(0)
    record = run.read()
    paused = record.attempts[0].model_copy(update={"reason": Reason.PREEMPTED, "last_step": 4})
    killed = record.model_copy(update={"attempts": [paused], "pause_at_step": 4, "result": None, "failure": ""})
    spec = sweep_folder.SweepFolder(place.runs).read().spec
    trial = sweep_folder.trial_of(0, killed, spec, None)
    assert (trial.step, trial.is_compared) == (3, False)


def test_limits_may_change(place):
    place.run()
    place.write(maxFailedTrials=0, parallelTrials=2, budgetGpuHours="5")
    assert place.run() == 0


def test_the_destination_of_another_sweep_is_refused_before_any_trial(place):
    place.run()
    (place.folder / "runs").rename(place.folder / "elsewhere")
    with pytest.raises(RunError, match=r"spec.template.spec.output.destination: .*sweep.json is the result of sweep"):
        place.run()
    assert not place.runs.exists()


@pytest.mark.parametrize("below", ["", "/out"])
def test_a_destination_in_the_sweeps_own_folder_is_refused(place, below):
    place.write(job={"output": {"destination": f"runs/search{below}"}})
    with pytest.raises(FieldError, match=r"spec.template.spec.output.destination: .* must not be in .*runs/search"):
        place.run()
    assert not (place.runs / "sweep.json").exists()


def test_errors_name_file_line_and_the_field_of_the_template(place):
    place.write(parameters=[{"path": "lora.rnk", "choices": [8]}])
    with pytest.raises(RefusedError, match=r'sweep.yaml:\d+: spec.parameters\[0\].path: "lora.rnk" must be the path'):
        place.run()
    place.write(job={"model": {"source": "org/base"}})
    with pytest.raises(RefusedError, match=r'spec.template.spec.model.source: "org/base" is no path here'):
        place.run()
    place.write(job={"model": {"source": "./nowhere"}})
    with pytest.raises(ManifestError, match=r"spec.template.spec.model.source: .* is not here"):
        place.run()
    place.write()
    with pytest.raises(FieldError, match="must be a multiple of the 3 ranks"):
        place.run(ranks=3)
    (place.folder / "sweep.yaml").write_text((place.folder / "job.yaml").read_text())
    with pytest.raises(RefusedError, match='kind: "QLoRAJob" must be QLoRASweep'):
        place.run()


def test_without_optuna_only_a_grid_runs(place, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    assert place.run() == 0
    place.write(algorithm={"type": "TPE"})
    with pytest.raises(RunError, match="needs Optuna, which is not installed here: install qlora with the extras"):
        place.run()


@pytest.mark.parametrize(
    ("metric", "value"), [("TrainingLoss", "2.5"), ("PeakMemory", str(3 << 30)), ("EvalLoss", "1.05")]
)
def test_the_objective_may_be_another_metric(place, metric, value):
    place.write(objective={"metric": metric})
    assert place.run() == 0, place.said
    assert place.result()["trials"][3]["value"] == value
