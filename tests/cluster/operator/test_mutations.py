"""Whatever a user writes is refused with its field's name, or runs, or waits for a reason: 300 random manifests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import yaml

from cluster.api import ClusterApiError
from cluster.scenarios.jobs import CRD, GROUP, qlora_job
from cluster.scenarios.mutations import mutations
from cluster.scenarios.script import pods_do
from cluster.scenarios.whole_life import ADAPTER, ends
from cluster.waits import eventually

if TYPE_CHECKING:
    from cluster.api import Object
    from cluster.scenarios.history import History
    from cluster.scenarios.mutations import Mutation

ALL, AT_ONCE, SEED = 300, 30, 20260101
ANSWER_SECONDS = 10
"""Conditions in which a job that was accepted reports its state."""


def mutants() -> list[Mutation]:
    versions = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    base = qlora_job(
        dataset={
            "train": {"source": "hf://org/rows", "credentials": "hub"},
            "eval": {"fraction": "0.1"},
            "format": "Messages",
            "columns": {"messages": "turns"},
            "chatTemplate": "{{ messages }}",
            "lossOn": "Assistant",
        },
        model={"credentials": "hub"},
        lora={"targetModules": ["q_proj", "v_proj"], "trainTokens": ["<|im_start|>"]},
        training={"microBatchSize": 4, "evaluation": {"everySteps": 5, "patience": 2}},
        checkpoint={"everySteps": 5},
        policy={"activeDeadlineSeconds": 600},
        scheduling={
            "gang": "None",
            "nodeSelector": {"type": "kwok"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
        output={"credentials": "store"},
    )
    return list(mutations(versions[0]["schema"]["openAPIV3Schema"], base, ALL, SEED))


@pytest.mark.parametrize("first", range(0, ALL, AT_ONCE))
def test_a_mutated_job_is_refused_with_its_fields_name_or_says_where_it_stands(
    crd_cluster, history, behind_proxy, kwok_namespace, first
):
    api, taken, silent = crd_cluster.api, {}, []
    with pods_do(api, kwok_namespace, ends(adapter=ADAPTER)):
        for number, mutation in enumerate(mutants()[first : first + AT_ONCE]):
            name = f"job-{number}"
            manifest = {**mutation.manifest, "metadata": {"name": name, "namespace": kwok_namespace}}
            try:
                api.post(f"{GROUP}/namespaces/{kwok_namespace}/qlorajobs", manifest, fieldValidation="Strict")
                taken[name] = mutation
            except ClusterApiError as error:
                if error.status not in (400, 422) or mutation.field not in error.message:
                    silent.append(f"{mutation}: {error}")
        assert silent == []
        for name, mutation in taken.items():
            assert eventually(lambda name=name: spoken(history, kwok_namespace, name), ANSWER_SECONDS), mutation
            state = spoken(history, kwok_namespace, name)[0]["status"]["state"]
            assert state != "Failed", f"{mutation}: the operator does not take what the API server took"
    assert behind_proxy.metric_sum("qlora_operator_reconcile_errors_total") <= len(taken)
    assert behind_proxy.healthz() == (200, "ok\n")


def spoken(history: History, namespace: str, name: str) -> list[Object]:
    """Versions of a job that say where it stands. It may be gone by now: its time to live may be none."""
    versions = (job for job in history.of("qlorajobs", namespace) if job["metadata"]["name"] == name)
    return [job for job in versions if speaks(job)]


def speaks(job: Object) -> bool:
    status = job.get("status", {})
    return bool(status.get("reason")) and any(c["message"] for c in status["conditions"])
