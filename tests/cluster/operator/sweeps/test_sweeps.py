"""QLoRASweeps on a real control plane: trials are QLoRAJobs, run to their end, and the best one is named."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from cluster.api import ClusterApiError
from cluster.scenarios.jobs import GROUP, condition, create_job, in_state, qlora_job
from cluster.scenarios.script import pods_do
from cluster.scenarios.sweeps import LOSSES, adapter, create_sweep, qlora_sweep, trials_pause_first, trials_succeed
from cluster.scenarios.whole_life import ends, word
from qlora_api.sweep.sweep import QLoRASweep
from qlora_sweep.results import Result
from qlora_sweep.suggest import suggest

LONG = 90
HALVING = {"minSteps": 2, "reductionFactor": 4}


def trials_of(api, namespace):
    return {job["metadata"]["name"]: job for job in api.list(f"{GROUP}/namespaces/{namespace}/qlorajobs")}


def most_running(history, namespace):
    """Return how many trials were at most created and not over at once."""
    most, over = 0, {}
    for version in history.of("qlorajobs", namespace):
        over[version["metadata"]["name"]] = version.get("status", {}).get("state") in ("Succeeded", "Failed")
        most = max(most, sum(not each for each in over.values()))
    return most


def test_a_grid_runs_to_its_end_two_trials_at_a_time_and_names_the_best(api, forked, history, kwok_namespace):
    with trials_succeed(api, kwok_namespace):
        path = create_sweep(api, qlora_sweep(kwok_namespace))
        done = api.wait_for(path, in_state("Succeeded", "Completed"), seconds=LONG)
    status = done["status"]
    assert status["best"] == {
        "name": "search-2",
        "value": "1.1",
        "parameters": {"lora.rank": "16", "training.learningRate": "1e-4"},
        "adapter": adapter("search-2"),
    }
    assert status["trials"] == {"total": 4, "created": 4, "running": 0, "suspended": 0, "succeeded": 4, "failed": 0}
    assert status["finished"] == "4/4"
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "Running": "False",
        "Succeeded": "True",
        "Finished": "True",
        "Ready": "True",
    }
    trials = trials_of(api, kwok_namespace)
    settings = {n: (t["spec"]["lora"]["rank"], t["spec"]["training"]["learningRate"]) for n, t in trials.items()}
    assert settings == {
        "search-0": (8, "1e-4"),
        "search-1": (8, "3e-4"),
        "search-2": (16, "1e-4"),
        "search-3": (16, "3e-4"),
    }
    for name, trial in trials.items():
        (owner,) = trial["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("QLoRASweep", done["metadata"]["uid"], True)
        assert trial["spec"]["output"]["destination"] == f"s3://adapters/search/trials/{name}"
    assert most_running(history, kwok_namespace) == 2


def test_halving_suspends_all_trials_at_the_comparison_and_resumes_the_best(api, forked, kwok_namespace):
    with trials_pause_first(api, kwok_namespace):
        path = create_sweep(api, qlora_sweep(kwok_namespace, earlyStopping=HALVING))
        done = api.wait_for(path, in_state("Succeeded"), seconds=LONG)
    assert done["status"]["best"]["name"] == "search-2"
    trials = trials_of(api, kwok_namespace)
    ends = {n: [a["reason"] for a in t["status"]["attempts"]] for n, t in trials.items()}
    paused = ("search-0", "search-1", "search-3")
    assert ends == {**{name: ["Paused"] for name in paused}, "search-2": ["Paused", "Completed"]}
    assert {n: t["spec"]["policy"].get("pauseAtStep") for n, t in trials.items()} == {
        **dict.fromkeys(paused, 2),
        "search-2": None,
    }
    assert done["status"]["trials"]["suspended"] == 3
    assert condition(done, "Ready")["message"].startswith("best of 4 trials: search-2, EvalLoss 1.1, lora.rank 16")


def test_random_trials_are_drawn_by_a_process_that_does_not_stay(api, forked, kwok_namespace):
    rates = {"path": "training.learningRate", "range": {"min": "1e-5", "max": "1e-3", "scale": "Log"}}
    with trials_succeed(api, kwok_namespace):
        manifest = qlora_sweep(kwok_namespace, parameters=[rates], algorithm={"type": "TPE", "seed": 3})
        path = create_sweep(api, manifest)
        api.wait_for(path, in_state("Succeeded"), seconds=LONG)
    spec, machine = QLoRASweep.from_manifest(manifest).spec, []
    for number in range(4):
        values = suggest(spec, number, machine)
        known = float(LOSSES[number]) if number < 2 else None  # drawn from those at least parallelTrials before
        machine.append(Result({p: str(v) for p, v in values.items()}, known))
    trials = trials_of(api, kwok_namespace)
    drawn = [trials[f"search-{n}"]["spec"]["training"]["learningRate"] for n in range(4)]
    assert drawn[:2] == [result.parameters["training.learningRate"] for result in machine[:2]]
    assert len(set(drawn)) == 4


def test_what_the_schema_cannot_refuse_is_said_before_a_trial_is_created(api, forked, kwok_namespace):
    path = create_sweep(api, qlora_sweep(kwok_namespace, maxTrials=3))
    failed = api.wait_for(path, in_state("Failed", "UserError"), seconds=LONG)
    assert condition(failed, "Failed")["message"] == (
        "spec.maxTrials: 3 must be at least 4, the combinations of the grid (2 × 2)"
    )
    assert trials_of(api, kwok_namespace) == {}
    wrong = qlora_sweep(kwok_namespace, "wrong", parameters=[{"path": "lora.rank", "choices": [8, "many"]}])
    failed = api.wait_for(create_sweep(api, wrong), in_state("Failed", "UserError"), seconds=LONG)
    assert "spec.parameters[0].choices[1]" in condition(failed, "Stalled")["message"]
    assert trials_of(api, kwok_namespace) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": [{"path": "lora.rnk", "choices": [8]}]}, "spec.parameters[0].path: Unsupported value"),
        ({"parameters": [{"path": "output.destination", "choices": ["a"]}]}, "spec.parameters[0].path: Unsupported"),
        ({"parameters": [{"path": "lora.rank"}]}, "must validate one and only one schema"),
        (
            {"parameters": [{"path": "lora.rank", "range": {"min": "8", "max": "8"}}], "algorithm": {"type": "TPE"}},
            "min must be less than max",
        ),
        ({"parameters": [{"path": "lora.rank", "choices": [8]}] * 2}, "parameters must not have a path twice"),
        ({"objective": {"metric": "Bleu"}}, "spec.objective.metric: Unsupported value"),
        ({"earlyStopping": {"minSteps": 3}}, "must be a multiple of template.spec.training.evaluation.everySteps"),
    ],
)
def test_the_api_server_refuses_what_its_schema_sees(api, crd_cluster, kwok_namespace, changes, said):
    with pytest.raises(ClusterApiError, match=re.escape(said)):
        api.create(qlora_sweep(kwok_namespace, **changes))


def test_settings_by_which_trials_are_compared_never_change_and_limits_do(api, crd_cluster, kwok_namespace):
    path = create_sweep(api, qlora_sweep(kwok_namespace, suspend=True))
    for change in (
        {"parameters": [*reversed(qlora_sweep(kwok_namespace)["spec"]["parameters"])]},
        {"objective": {"metric": "TrainingLoss"}},
        {"algorithm": {"seed": 4}},
        {"earlyStopping": {"minSteps": 2}},
        {"template": {"spec": {"policy": {"maxRestarts": 9}}}},
    ):
        with pytest.raises(ClusterApiError, match="is immutable: trials with different settings cannot be compared"):
            api.patch(path, {"spec": change})
    api.patch(path, {"spec": {"maxTrials": 8, "parallelTrials": 4, "budgetGpuHours": "3", "suspend": False}})


def test_a_budget_suspends_what_runs_and_a_larger_one_resumes_it(api, forked, kwok_namespace):
    stops = {"stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped at step 5")}
    jobs = f"{GROUP}/namespaces/{kwok_namespace}/qlorajobs"
    with pods_do(api, kwok_namespace, stops, attempt=1):
        path = create_sweep(api, qlora_sweep(kwok_namespace, budgetGpuHours="0.0005"))  # 1.8 s of one GPU
        held = api.wait_for(path, in_state("Suspended", "BudgetReached"), seconds=LONG)
        assert held["status"]["trials"]["suspended"] == 2
        assert "raise spec.budgetGpuHours to resume" in condition(held, "Suspended")["message"]
        assert all(job["spec"]["suspend"] for job in api.list(jobs))
    with trials_succeed(api, kwok_namespace):
        api.patch(path, {"spec": {"budgetGpuHours": "100"}})
        done = api.wait_for(path, in_state("Succeeded"), seconds=LONG)
    assert float(done["status"]["gpuHours"]) >= 0.0005
    events = api.list(f"/apis/events.k8s.io/v1/namespaces/{kwok_namespace}/events")
    told = Counter(e["reason"] for e in events if e["regarding"]["kind"] == "QLoRASweep")
    assert told == {"Started": 1, "BudgetReached": 1, "Resumed": 1, "Completed": 1}


def test_trials_that_fail_end_the_sweep_and_suspend_the_others(api, forked, kwok_namespace):
    with (
        pods_do(api, kwok_namespace, ends(40, "UserError", "no such layer"), job="search-0"),
        pods_do(api, kwok_namespace, {"stop-exit-code": 43, "stop-message": word(43, "Preempted")}, job="search-1"),
    ):
        path = create_sweep(api, qlora_sweep(kwok_namespace, maxFailedTrials=0))
        failed = api.wait_for(path, in_state("Failed", "TrialsFailed"), seconds=LONG)
        other = f"{GROUP}/namespaces/{kwok_namespace}/qlorajobs/search-1"
        api.wait_for(other, in_state("Suspended"), seconds=LONG)
    assert "the last: search-0: no such layer" in condition(failed, "Failed")["message"]
    assert set(trials_of(api, kwok_namespace)) == {"search-0", "search-1"}


def test_a_job_that_another_made_is_no_trial_whatever_it_says_of_itself(api, forked, kwok_namespace):
    """Its labels name the sweep, and its controller is another one; where it has a trial's name, it is waited for."""
    pretender = qlora_job("search-1", kwok_namespace, suspend=True)
    pretender["metadata"]["labels"] = {"qlora.dev/sweep": "search"}
    owner = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRASweep", "name": "search", "controller": True}
    pretender["metadata"]["ownerReferences"] = [owner | {"uid": "11111111-2222-3333-4444-555555555555"}]
    with trials_succeed(api, kwok_namespace):
        # without its owner, the garbage collector deletes it
        path = create_job(api, pretender | {"metadata": pretender["metadata"] | {"ownerReferences": []}})
        sweep = create_sweep(api, qlora_sweep(kwok_namespace))
        refused = api.wait_for(sweep, in_state("Pending", "Refused"), seconds=LONG)
        assert (
            'a QLoRAJob named "search-1" is there that is not a trial of this sweep'
            in (condition(refused, "Ready")["message"])
        )
        assert refused["status"]["trials"]["created"] == 1
        api.delete(path)
        done = api.wait_for(sweep, in_state("Succeeded"), seconds=LONG)
    assert done["status"]["trials"]["succeeded"] == 4


def test_trials_go_with_their_sweep(api, forked, kwok_namespace):
    path = create_sweep(api, qlora_sweep(kwok_namespace))
    jobs = f"{GROUP}/namespaces/{kwok_namespace}/qlorajobs"
    api.wait_for(jobs, lambda found: len(found["items"]) == 2, seconds=LONG)
    api.delete(path)
    for place in (jobs, f"/api/v1/namespaces/{kwok_namespace}/pods"):
        api.wait_for(place, lambda found: not found["items"], seconds=LONG, what=f"nothing left in {place}")
