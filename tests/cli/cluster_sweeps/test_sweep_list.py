"""Sweeps of a cluster as texts, and the plan before one is created."""

import pytest

from cli_builders import NOW
from qlora_cli.cluster_sweeps import sweep_list
from qlora_cli.cluster_sweeps.cluster_sweep import cluster_sweep
from qlora_cli.cluster_sweeps.plan_sweep import sweep_summary

LONG = "support-answers-llama-3-1-8b-rank-and-rate-search"
USED = "40.1 of 40 GPU-hours are used; raise spec.budgetGpuHours to resume; no trial runs"


def sweep(name="search", state="Running", reason="Searching", message="", **status):
    ready = {"type": "Ready", "status": "False", "reason": reason, "message": message}
    counts = {"total": 18, "created": 4, "running": 2, "succeeded": 1, "failed": 1}
    best = {"name": f"{name}-2", "value": "1.1042", "parameters": {"lora.rank": "16"}}
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRASweep",
        "metadata": {"name": name, "namespace": "research", "creationTimestamp": "2026-01-02T09:58:00Z"},
        "spec": {"objective": {"metric": "EvalLoss"}, "budgetGpuHours": "40"},
        "status": {
            "state": state,
            "reason": reason,
            "conditions": [ready],
            "trials": counts,
            "best": best,
            "gpuHours": "12.417",
            **status,
        },
    }


@pytest.mark.parametrize("width", [80, 160])
def test_a_list_of_sweeps_shows_states_trials_and_messages(golden, width):
    bodies = [
        sweep(),
        sweep(LONG, "Suspended", "BudgetReached", USED, gpuHours="40.1"),
        sweep("done", "Succeeded", "Completed"),
    ]
    lines = sweep_list.lines(*sweep_list.table([cluster_sweep(body) for body in bodies], NOW), width)
    assert max(map(len, lines)) <= width
    golden(f"list-sweeps-{width}.txt", "\n".join(line.plain for line in lines) + "\n")


def test_the_plan_of_a_sweep_has_trials_budget_and_the_steps_that_early_stopping_leaves():
    job = {
        "model": {"source": "hf://org/base@main"},
        "dataset": {"train": {"source": "s3://data/rows.jsonl"}, "eval": {"fraction": "0.1"}, "format": "Text"},
        "training": {"maxSteps": 90, "globalBatchSize": 16, "evaluation": {"everySteps": 10}},
        "parallelism": {"workers": 2, "gpusPerWorker": 4},
        "output": {"destination": "s3://adapters/search"},
    }
    spec = {
        "template": {"spec": job},
        "parameters": [{"path": "lora.rank", "choices": [8, 16, 64]}],
        "algorithm": {"type": "Grid"},
        "earlyStopping": {"minSteps": 30, "reductionFactor": 3},
        "maxTrials": 3,
        "parallelTrials": 2,
        "budgetGpuHours": "40",
    }
    body = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRASweep", "metadata": {"name": "search"}, "spec": spec}
    rows = dict(sweep_summary(body, None, []))
    assert rows["Trials"] == "at most 3, 2 at a time on 16 GPUs; 150 of 270 steps, by early stopping"
    assert rows["Budget"] == "40 GPU-hours of all trials together"
    assert rows["Parameters"] == "lora.rank 8, 16, 64"
    assert rows["Memory"].startswith("not planned")
