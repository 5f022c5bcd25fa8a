"""QLoRASweeps whose trials train in real pods, beside the same sweeps by ``qlora sweep`` on this machine.

``make soak-sweep`` (SOAK_SWEEP=1) sweeps the quickstart's base and rows: a grid of 12 trials on the cluster and here,
and successive halving of the same 12 trials on the cluster. Without it, 3 trials of a toy base are halved.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cluster.scenarios.jobs import GROUP, in_state, merged
from cluster.scenarios.sweeps import create_sweep
from demo.check_adapter import check_adapter
from demo.installed_cluster import SECRET
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.api import Object
    from demo.installed_cluster import InstalledCluster

EXAMPLES = Path(__file__).parents[2] / "examples"
FIGURES = EXAMPLES.parent / "build" / "soak-sweep"
BUCKET = "quickstart"
SOAK_SECONDS = 3600.0
"""Limit of one sweep of 12 trials: some 10 CPU minutes."""
STEPS, PAUSE = 24, 4
BUDGET_GPU_HOURS = "4"
EVAL_ROWS = 200
CLOSE = 1.01
"""Factor within which halving must come to the best value of the grid."""

soak = pytest.mark.skipif(os.environ.get("SOAK_SWEEP") != "1", reason="takes 25 minutes: make soak-sweep")


@dataclass(frozen=True)
class TrialOutcome:
    """Trial of a finished sweep, wherever it ran."""

    parameters: dict[str, str]
    value: str
    """Lowest evaluation loss."""
    step: int


@dataclass(frozen=True)
class SweepOutcome:
    """Outcome of a sweep, wherever it ran."""

    best: str
    gpu_hours: float
    trials: dict[str, TrialOutcome]

    @property
    def best_value(self) -> float:
        return float(self.trials[self.best].value)

    @property
    def steps(self) -> int:
        return sum(trial.step for trial in self.trials.values())


# ------------------------------------------------------------------------------------------------------------- the runs


def sweep_on_cluster(installed: InstalledCluster, team: str, manifest: Object, seconds: float) -> Object:
    """Create a sweep in a namespace, and return it once it has succeeded."""
    path = create_sweep(installed.cluster.api, {**manifest, "metadata": {**manifest["metadata"], "namespace": team}})

    def is_over(sweep: Object) -> bool:
        return bool(in_state("Succeeded")(sweep) or in_state("Failed")(sweep) or in_state("Suspended")(sweep))

    try:
        done = installed.cluster.api.wait_for(path, is_over, seconds=seconds, what="the sweep is over")
    except TimeoutError:
        done = installed.cluster.api.get(path)
    stories = [installed.story(team, name) for name in trials_of(installed, team, done)]
    assert in_state("Succeeded", "Completed")(done), "\n".join([json.dumps(done["status"], indent=1), *stories])
    return done


def trials_of(installed: InstalledCluster, team: str, sweep: Object) -> dict[str, Object]:
    """Return the QLoRAJobs of a sweep by name."""
    selector = f"qlora.dev/sweep={sweep['metadata']['name']}"
    jobs = installed.cluster.api.list(f"{GROUP}/namespaces/{team}/qlorajobs", labelSelector=selector)
    return {job["metadata"]["name"]: job for job in jobs}


def outcome_on_cluster(installed: InstalledCluster, team: str, sweep: Object) -> SweepOutcome:
    """Read the outcome from status of the sweep and of its trials."""
    paths = [parameter["path"] for parameter in sweep["spec"]["parameters"]]
    trials = {}
    for name, job in trials_of(installed, team, sweep).items():
        values = {path: str(job["spec"][path.partition(".")[0]][path.partition(".")[2]]) for path in paths}
        progress = job["status"]["progress"]
        trials[name] = TrialOutcome(values, progress["bestEvalLoss"], progress["step"])
    status = sweep["status"]
    return SweepOutcome(status["best"]["name"], float(status["gpuHours"]), trials)


def sweep_here(installed: InstalledCluster, manifest: Object, folder: Path) -> SweepOutcome:
    """Run a sweep with 'qlora sweep', with the objects of the cluster's buckets, and read its result."""
    path = folder / "sweep.json"
    path.write_text(json.dumps(manifest))  # JSON is YAML
    environment = {
        **os.environ,
        **installed.s3.environment,
        "QLORA_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",  # as in the pods
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "qlora_cli", "sweep", path, "--ranks", "1", "--runs-dir", folder / "runs"]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=SOAK_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    bucket, _, place = manifest["spec"]["template"]["spec"]["output"]["destination"][len("s3://") :].partition("/")
    result = json.loads((installed.s3.folder_of(bucket) / place / "sweep.json").read_text())
    trials = {t["name"]: TrialOutcome(t["parameters"], t["value"], t["step"]) for t in result["trials"]}
    return SweepOutcome(result["best"]["name"], sum(t["gpuSeconds"] for t in result["trials"]) / 3600, trials)


# ----------------------------------------------------------------------------------------------------- a few toy trials


@pytest.fixture(scope="module", autouse=True)
def operator(installed: InstalledCluster) -> None:
    """Install the operator with the settings of conftest.py: tests of other files change and uninstall it."""
    installed.install()


def test_trials_in_pods_are_halved_and_the_best_resumes_to_an_adapter_that_loads(installed, team, bucket):
    rates = ["5e-5", "5e-4", "5e-3"]
    template = installed.s3_job(
        "search",
        team,
        bucket,
        training={"maxSteps": STEPS, "evaluation": {"everySteps": PAUSE}},
        parallelism={"workers": 1, "zeroStage": 0},
    )
    manifest = {
        "apiVersion": template["apiVersion"],
        "kind": "QLoRASweep",
        "metadata": {"name": "search"},
        "spec": {
            "template": {"spec": template["spec"]},
            "parameters": [{"path": "training.learningRate", "choices": rates}],
            "algorithm": {"type": "Grid"},
            "earlyStopping": {"minSteps": PAUSE, "reductionFactor": len(rates)},
            "maxTrials": len(rates),
            "parallelTrials": 2,
            "budgetGpuHours": BUDGET_GPU_HOURS,
        },
    }
    done = sweep_on_cluster(installed, team, manifest, 2 * PATIENCE_SECONDS)
    found = outcome_on_cluster(installed, team, done)
    assert found.best == "search-2"
    assert [trial.step for trial in found.trials.values()] == [PAUSE, PAUSE, STEPS]
    jobs = trials_of(installed, team, done)
    ends = {name: [attempt["reason"] for attempt in job["status"]["attempts"]] for name, job in jobs.items()}
    assert ends == {"search-0": ["Paused"], "search-1": ["Paused"], "search-2": ["Paused", "Completed"]}
    first, last = jobs["search-2"]["status"]["attempts"]
    assert first["lastStep"] == last["firstStep"] == PAUSE
    assert 0 < found.gpu_hours <= float(BUDGET_GPU_HOURS)
    check_adapter(installed, done["status"]["best"]["adapter"])


# ------------------------------------------------------------------------------------------- the quickstart's 12 trials


@pytest.fixture(scope="module")
def quickstart(installed: InstalledCluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a bucket with the quickstart's base and rows, and fewer of its held-out rows."""
    data = tmp_path_factory.mktemp("quickstart") / "data"
    prepare = [sys.executable, EXAMPLES / "quickstart" / "prepare.py", "--out", data]
    subprocess.run(prepare, check=True, timeout=SOAK_SECONDS)
    rows = (data / "eval.jsonl").read_text().splitlines(keepends=True)
    (data / "eval.jsonl").write_text("".join(rows[:EVAL_ROWS]))
    address = installed.s3.bucket(BUCKET)
    shutil.copytree(data, installed.s3.folder_of(BUCKET), dirs_exist_ok=True)
    return address


def quickstart_sweep(bucket: str, destination: str, **spec: Any) -> Object:
    """Return examples/quickstart-sweep.yaml over a bucket: fewer steps, one rank a trial, two trials at a time."""
    manifest = yaml.safe_load((EXAMPLES / "quickstart-sweep.yaml").read_text())
    changed = manifest["spec"]
    job = changed["template"]["spec"]
    del changed["earlyStopping"], job["training"]["epochs"]
    changed["template"]["spec"] = merged(
        job,
        {
            "model": {"source": f"{bucket}/base", "credentials": SECRET},
            "dataset": {
                "train": {"source": f"{bucket}/train.jsonl", "credentials": SECRET},
                "eval": {"source": f"{bucket}/eval.jsonl"},
            },
            "training": {
                "maxSteps": STEPS,
                "microBatchSize": 4,
                "warmupSteps": 2,
                "evaluation": {"everySteps": PAUSE},
            },
            "parallelism": {"workers": 1, "zeroStage": 0},
            "checkpoint": {"everySteps": STEPS},
            "output": {"destination": f"{bucket}/adapters/{destination}", "credentials": SECRET},
        },
    )
    manifest["spec"] = {**changed, "parallelTrials": 2, "budgetGpuHours": BUDGET_GPU_HOURS, **spec}
    return manifest


@pytest.fixture(scope="module")
def grid(installed: InstalledCluster, quickstart: str) -> Iterator[SweepOutcome]:
    """Give the outcome of the whole grid on the cluster."""
    team = installed.tenant()
    done = sweep_on_cluster(installed, team, quickstart_sweep(quickstart, "grid"), SOAK_SECONDS)
    check_adapter(installed, done["status"]["best"]["adapter"])
    yield written("grid-on-cluster", outcome_on_cluster(installed, team, done))
    installed.cluster.delete_namespace(team)


def written(name: str, found: SweepOutcome) -> SweepOutcome:
    """Write an outcome into FIGURES, for the documents, and return it."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / f"{name}.json").write_text(json.dumps(asdict(found), indent=1))
    return found


@soak
@pytest.mark.timeout(3 * SOAK_SECONDS)
def test_a_grid_of_twelve_in_pods_and_here_has_the_same_trials_and_the_same_best(installed, grid, quickstart, tmp_path):
    here = written("grid-here", sweep_here(installed, quickstart_sweep(quickstart, "here"), tmp_path))
    assert len(grid.trials) == 12
    assert {n: t.parameters for n, t in grid.trials.items()} == {n: t.parameters for n, t in here.trials.items()}
    assert {t.step for t in (*grid.trials.values(), *here.trials.values())} == {STEPS}
    # One rank, one thread and the same libraries: the same sums in the same order.
    assert {n: t.value for n, t in grid.trials.items()} == {n: t.value for n, t in here.trials.items()}
    assert grid.best == here.best
    for found in (grid, here):
        assert 0 < found.gpu_hours <= float(BUDGET_GPU_HOURS)


@soak
@pytest.mark.timeout(3 * SOAK_SECONDS)
def test_halving_takes_at_most_half_the_steps_of_the_grid_and_comes_within_one_percent(
    installed, grid, quickstart, team
):
    manifest = quickstart_sweep(quickstart, "halving", earlyStopping={"minSteps": PAUSE, "reductionFactor": 3})
    done = sweep_on_cluster(installed, team, manifest, SOAK_SECONDS)
    found = written("halving-on-cluster", outcome_on_cluster(installed, team, done))
    assert {n: t.parameters for n, t in found.trials.items()} == {n: t.parameters for n, t in grid.trials.items()}
    assert found.steps <= grid.steps / 2
    assert found.best_value <= CLOSE * grid.best_value
    # It was suspended twice, and has the losses of the trial that never was.
    assert found.trials[found.best].value == grid.trials[found.best].value
    check_adapter(installed, done["status"]["best"]["adapter"])
