"""Profiles on a real API server, from the tenant's side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.api import ClusterApiError
from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import GROUP, condition, create_job, in_state, qlora_job

if TYPE_CHECKING:
    from collections.abc import Iterator

PODS = "/api/v1/namespaces/{}/pods"
PROFILES = {
    "wide": {
        "nodeSelector": {"type": "kwok"},
        "cpu": {"default": "8", "max": "16"},
        "capabilities": ["IPC_LOCK"],
        "annotations": {"k8s.v1.cni.cncf.io/networks": "ib0"},
        "topologySpreadConstraints": [{"topologyKey": "kubernetes.io/hostname"}],
        "affinity": {
            "podAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "topologyKey": "kubernetes.io/os",
                        "labelSelector": {"matchLabels": {"app.kubernetes.io/managed-by": "qlora-operator"}},
                        "matchLabelKeys": ["qlora.dev/job-uid"],
                    }
                ]
            }
        },
    }
}


@pytest.fixture
def profiled(fork_server, crd_cluster, kwok_namespace, tmp_path) -> Iterator[ForkedOperator]:
    """A running operator with a profile, that serves the test's namespace."""
    settings = {"namespaces": [kwok_namespace], "profiles": PROFILES}
    with ForkedOperator(fork_server, tmp_path / "operator", crd_cluster.kubeconfig, **settings) as running:
        yield running


def test_a_profile_that_is_not_there_is_named_with_those_that_are_and_a_correction_is_followed(
    crd_cluster, kwok_namespace, profiled
):
    api = crd_cluster.api
    path = create_job(api, qlora_job("job", kwok_namespace, workers=2, scheduling={"profile": "wiede"}))
    job = api.wait_for(path, in_state("Pending", "MissingReference"))
    said = condition(job, "Running")["message"]
    assert said == (
        'spec.scheduling.profile: "wiede" is not a profile of this cluster; did you mean "wide"? Allowed: default, wide'
    )
    assert api.list(PODS.format(kwok_namespace)) == []

    api.patch(path, {"spec": {"scheduling": {"profile": "wide", "cpu": "17"}}})
    job = api.wait_for(path, in_state("Pending", "Refused"))
    assert 'spec.scheduling.cpu: "17" is not allowed by profile "wide": 8 to 16' in condition(job, "Running")["message"]

    api.patch(path, {"spec": {"scheduling": {"cpu": "16"}}})
    api.wait_for(path, in_state("Running"))
    pods = api.list(PODS.format(kwok_namespace))
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2, "the profile spreads the pods of an attempt"
    for pod in pods:
        [container] = pod["spec"]["containers"]
        assert container["resources"]["requests"]["cpu"] == "16"
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        assert pod["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == "ib0"


@pytest.mark.parametrize(
    ("scheduling", "said"),
    [
        ({"profile": "wide", "nodeSelector": {"a": "b"}}, "nodeSelector must not be set together with profile"),
        ({"profile": "wide", "tolerations": [{"key": "a"}]}, "tolerations must not be set together with profile"),
        ({"profile": "wide", "hostNetwork": True}, 'unknown field "spec.scheduling.hostNetwork"'),
        ({"profile": "Wide"}, "spec.scheduling.profile"),
        ({"cpu": "lots"}, "spec.scheduling.cpu"),
        ({"memory": "-1"}, "spec.scheduling.memory"),
    ],
    ids=str,
)
def test_the_api_server_refuses_what_goes_beyond_a_profile(crd_cluster, kwok_namespace, scheduling, said):
    manifest = qlora_job("job", kwok_namespace, scheduling=scheduling)
    with pytest.raises(ClusterApiError) as caught:
        crd_cluster.api.post(f"{GROUP}/namespaces/{kwok_namespace}/qlorajobs", manifest, fieldValidation="Strict")
    assert said in str(caught.value)
