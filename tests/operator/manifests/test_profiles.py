"""Profiles: what a job gets by a name, and that it gets nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from operator_builders import CONFIG, attempt, child, decide, job, names, observed
from qlora_api.errors import ManifestError, validate
from qlora_api.job import QLoRAJob
from qlora_api.spec import Gang
from qlora_api.status import QLoRAJobStatus, Reason
from qlora_operator.config import OperatorConfig
from qlora_operator.manifests import render
from qlora_operator.manifests.profiles import gpu_of, profile_of, profile_problem
from qlora_operator.state.observed import PREPARE, JobState

PROFILES: dict[str, Any] = {
    "efa": {
        "gpu": "h100-80gb",
        "nodeSelector": {"pool": "h100"},
        "tolerations": [{"operator": "Exists"}],
        "resourcesPerGpu": {"vpc.amazonaws.com/efa": "4"},
        "resourcesPerPod": {"rdma/hca": "1"},
        "cpu": {"default": "8", "min": "500m", "max": "16"},
        "memory": {"default": "64Gi", "max": "128Gi"},
        "capabilities": ["IPC_LOCK"],
        "hostNetwork": True,
        "annotations": {"k8s.v1.cni.cncf.io/networks": "ib0"},
        "labels": {"team": "ml"},
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        "volumes": [{"name": "ca", "mountPath": "/etc/ca", "configMap": {"name": "ca"}}],
        "prepare": {"cpu": "1", "memory": "4Gi", "nodeSelector": {"kubernetes.io/arch": "arm64"}},
    },
    "product": {"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L4"}},
    "mig": {"gpuResource": "nvidia.com/mig-3g.40gb"},
    "cpu": {"gpuResource": ""},
}


def config_with(profiles: dict[str, Any] | None = None, **more: Any) -> OperatorConfig:
    trainer = {"image": "trainer:1", "gpu": "a100-80gb", "runtimeClassName": "nvidia"}
    return validate(
        OperatorConfig, {"trainer": trainer, "profiles": PROFILES if profiles is None else profiles, **more}
    )


def by(**scheduling: Any) -> QLoRAJob:
    return job(parallelism={"gpusPerWorker": 2}, scheduling=scheduling)


def pod_of(a_job: QLoRAJob, config: OperatorConfig) -> dict[str, Any]:
    """The trainer's pod template."""
    return render.attempt(a_job, config, Gang.NONE, attempt(1, worldSize=2), QLoRAJobStatus())[-1]["spec"]["template"]


def without_config(pod: dict[str, Any]) -> dict[str, Any]:
    """Without what the trainer reads, in which the job's own spec stands."""
    metadata = pod["metadata"] | {
        "annotations": {k: v for k, v in pod["metadata"]["annotations"].items() if "config" not in k}
    }
    return pod | {"metadata": metadata}


# ------------------------------------------------------------------------------------------------------- what it gives


def test_a_profile_gives_a_trainer_all_of_it():
    pod = pod_of(by(profile="efa"), config_with())
    [container] = pod["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert (limits["memory"], container["resources"]["requests"]["cpu"]) == ("128Gi", "16")
    assert limits["vpc.amazonaws.com/efa"] == "8"
    assert limits["rdma/hca"] == "1"
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]
    assert {"operator": "Exists"} in pod["spec"]["tolerations"]
    assert (pod["spec"]["hostNetwork"], pod["spec"]["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert pod["metadata"]["labels"]["team"] == "ml"


def test_prepare_runs_where_the_profile_says_and_not_on_the_trainers_network():
    pod = render.prepare(by(profile="efa"), config_with())["spec"]["template"]
    assert pod["spec"]["nodeSelector"] == {"kubernetes.io/arch": "arm64"}
    assert pod["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "1"
    assert {"name": "profile-ca", "configMap": {"name": "ca"}} in pod["spec"]["volumes"]
    assert "hostNetwork" not in pod["spec"]
    assert "k8s.v1.cni.cncf.io/networks" not in pod["metadata"]["annotations"]
    assert pod["spec"]["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(
    ("scheduling", "gpu"),
    [
        ({}, "a100-80gb"),
        ({"profile": "efa"}, "h100-80gb"),
        ({"profile": "product"}, "l4-24gb"),
        ({"profile": "mig"}, None),
        ({"profile": "cpu"}, None),
        ({"profile": "missing"}, None),
    ],
    ids=["default", "by-kind", "by-product", "part-of-a-card", "cpu", "unknown"],
)
def test_the_kind_of_gpu_follows_from_the_profile(scheduling, gpu):
    assert gpu_of(by(**scheduling).spec, config_with()) == gpu


def test_a_profile_without_gpus_trains_on_the_cpu_and_needs_no_runtime_class():
    pod = pod_of(by(profile="cpu"), config_with())
    assert "runtimeClassName" not in pod["spec"]
    assert "nvidia.com/gpu" not in pod["spec"]["containers"][0]["resources"]["limits"]
    assert '"device":"CPU"' in pod["metadata"]["annotations"]["qlora.dev/config"]


def test_a_volume_of_the_profiles_can_take_the_place_of_the_cache():
    volume = {"name": "nvme", "mountPath": "/cache", "emptyDir": {"medium": "Memory"}}
    pod = pod_of(by(), config_with({"default": {"volumes": [volume]}}))
    assert [v for v in pod["spec"]["volumes"] if v["name"] == "cache"] == [
        {"name": "cache", "emptyDir": {"medium": "Memory"}}
    ]
    assert [m["name"] for m in pod["spec"]["containers"][0]["volumeMounts"]].count("cache") == 1


def labels_of(manifest: dict[str, Any]) -> dict[str, str]:
    return {k: v for k, v in manifest["metadata"]["labels"].items() if k.startswith("kueue")}


def test_kueue_queues_prepare_only_by_a_queue_of_its_own_and_everything_by_the_jobs_priority():
    a_job = by(queue="main")
    metadata = a_job.metadata.model_copy(update={"labels": {"kueue.x-k8s.io/priority-class": "low", "other": "x"}})
    a_job = a_job.model_copy(update={"metadata": metadata})
    trainer = render.attempt(a_job, config_with(), Gang.KUEUE, attempt(1, worldSize=2), QLoRAJobStatus())[-1]
    own = {"kueue.x-k8s.io/queue-name": "main", "kueue.x-k8s.io/priority-class": "low"}
    assert labels_of(trainer) == own
    assert labels_of(render.prepare(a_job, config_with())) == {}
    queued = config_with(prepare={"queue": "cpu"})
    assert labels_of(render.prepare(a_job, queued)) == own | {"kueue.x-k8s.io/queue-name": "cpu"}


@pytest.mark.parametrize(("queue", "said"), [(None, "have the chart's prepare.queue name"), ("cpu", 'queue "cpu"')])
def test_prepare_that_kueue_suspends_says_what_for(queue, said):
    config = config_with(prepare={"queue": queue} if queue else {})
    decision = decide(by(queue="main"), observed(child(PREPARE, JobState.SUSPENDED)), config)
    assert decision.status.reason is Reason.QUEUED
    assert said in decision.status.conditions[0].message


def test_pods_are_limited_to_the_cpus_they_request_where_the_chart_says_so():
    config = config_with()
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"limit_cpu": True})})
    for pod in (render.prepare(by(), config)["spec"]["template"], pod_of(by(), config)):
        resources = pod["spec"]["containers"][0]["resources"]
        assert resources["limits"]["cpu"] == resources["requests"]["cpu"]


# ---------------------------------------------------------------------------------------------------- the tenant's side


@pytest.mark.parametrize("profile", [*PROFILES, "default"])
def test_a_job_changes_nothing_of_its_pods_but_cpu_and_memory(profile):
    """Everything else that a job may say of scheduling: its own class, queue and gang."""
    config = config_with({**PROFILES, "default": {**PROFILES["efa"], "hostNetwork": False}})
    bounds = profile_of(by(profile=profile).spec, config)
    assert bounds is not None
    plain = pod_of(by(profile=profile), config)
    asked = {"cpu": bounds.cpu.most, "memory": bounds.memory.most} if bounds.cpu and bounds.memory else {}
    other = pod_of(by(profile=profile, **asked, queue="q", gang="None"), config)
    resources = other["spec"]["containers"][0].pop("resources")
    usual = plain["spec"]["containers"][0].pop("resources")
    assert without_config(other) == without_config(plain)
    assert set(resources["limits"]) == set(usual["limits"])
    assert {k: v for k, v in resources["limits"].items() if k != "memory"} == {
        k: v for k, v in usual["limits"].items() if k != "memory"
    }


@pytest.mark.parametrize(
    ("scheduling", "said"),
    [
        (
            {"profile": "eaf"},
            (
                'spec.scheduling.profile: "eaf" is not a profile of this cluster; did you mean "efa"? '
                "Allowed: cpu, default, efa, mig, product"
            ),
        ),
        (
            {"profile": "zzz"},
            'spec.scheduling.profile: "zzz" is not a profile of this cluster; allowed: cpu, default, efa, mig, product',
        ),
        (
            {"profile": "efa", "cpu": "17"},
            'spec.scheduling.cpu: "17" is not allowed by profile "efa": 500m to 16 for each GPU',
        ),
        (
            {"profile": "efa", "cpu": "400m"},
            'spec.scheduling.cpu: "400m" is not allowed by profile "efa": 500m to 16 for each GPU',
        ),
        (
            {"profile": "efa", "memory": "1Ti"},
            'spec.scheduling.memory: "1Ti" is not allowed by profile "efa": 64Gi to 128Gi for each GPU',
        ),
        ({"memory": "33Gi"}, 'spec.scheduling.memory: "33Gi" is not allowed by profile "default": 32Gi for each GPU'),
        ({"cpu": "4", "memory": "32Gi"}, ""),
        ({"cpu": "4000m"}, ""),
        ({"profile": "efa", "cpu": "16", "memory": "131072Mi"}, ""),
        ({"profile": "default"}, ""),
    ],
)
def test_what_a_profile_does_not_allow_is_said_with_what_it_does(scheduling, said):
    assert profile_problem(by(**scheduling).spec.scheduling, config_with()) == said


def test_a_job_selects_no_other_nodes_than_the_default_profiles():
    config = config_with({"default": {"nodeSelector": {"pool": "a", "kubernetes.io/arch": "amd64"}}})
    said = profile_problem(by(nodeSelector={"pool": "b"}).spec.scheduling, config)
    assert said.startswith('spec.scheduling.nodeSelector: pool is "b", and profile "default" has "a"')
    pod = pod_of(by(nodeSelector={"pool": "a", "zone": "1"}), config)
    assert pod["spec"]["nodeSelector"] == {"pool": "a", "kubernetes.io/arch": "amd64", "zone": "1"}


def test_what_a_profile_does_not_allow_has_one_remedy():
    scheduling = {"nodeSelector": {"pool": "b"}}
    config = config_with({"default": {"nodeSelector": {"pool": "a"}}})
    (prepared,) = [c for c in decide(by(**scheduling), observed(), config).status.conditions if c.type == "Prepared"]
    assert prepared.message == profile_problem(by(**scheduling).spec.scheduling, config)


@pytest.mark.parametrize("field", [{"nodeSelector": {"pool": "b"}}, {"tolerations": [{"key": "spot"}]}], ids=str)
def test_a_named_profile_and_free_form_fields_exclude_each_other(field):
    with pytest.raises(ManifestError, match=f"{next(iter(field))} must not be set together with profile"):
        by(profile="efa", **field)


@pytest.mark.parametrize(
    ("scheduling", "reason"),
    [({"profile": "eaf"}, Reason.MISSING_REFERENCE), ({"profile": "efa", "cpu": "99"}, Reason.REFUSED)],
)
@pytest.mark.parametrize("prepares", [True, False], ids=["before-prepare", "before-an-attempt"])
def test_no_pod_is_made_by_a_profile_that_does_not_allow_it(scheduling, reason, prepares):
    config = config_with(prepare={"enabled": prepares})
    decision = decide(by(**scheduling), observed(), config)
    assert names(decision) == []
    assert (decision.status.state, decision.status.reason) == ("Pending", reason)
    assert decision.wake_after
    corrected = decide(by(profile="efa").model_copy(update={"status": decision.status}), observed(), config)
    assert names(corrected)


def test_an_attempt_that_runs_goes_on_when_its_profile_is_gone():
    status = QLoRAJobStatus(attempts=[attempt(1, worldSize=2)])
    running = by(profile="gone").model_copy(update={"status": status})
    decision = decide(running, observed(child(ready=1)), CONFIG)
    assert (decision.delete, decision.create) == ((), ())
    assert decision.status.state == "Running"


def test_a_jobs_own_labels_and_annotations_replace_none_of_the_profiles():
    own = {"podLabels": {"team": "x", "mine": "1"}, "podAnnotations": {"k8s.v1.cni.cncf.io/networks": "host"}}
    metadata = pod_of(by(profile="efa", **own), config_with())["metadata"]
    assert (metadata["labels"]["team"], metadata["labels"]["mine"]) == ("ml", "1")
    assert metadata["annotations"]["k8s.v1.cni.cncf.io/networks"] == "ib0"


# ---------------------------------------------------------------------------------------------------- the platform team


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"gpu": "h100"}, 'profiles.p.gpu: "h100" is not known; did you mean "h100-80gb"?'),
        ({"gpuResource": "gpu"}, "gpuResource"),
        ({"cpu": {"default": "4", "min": "8"}}, "default: 4 must lie between min (8) and max (4)"),
        ({"memory": {"default": "64Gi", "max": "32Gi"}}, "default: 64Gi must lie between min (64Gi) and max (32Gi)"),
        ({"affinity": {"nodes": {}}}, '"nodes" is not known; use nodeAffinity, podAffinity, podAntiAffinity'),
        ({"labels": {"qlora.dev/job": "x"}}, '"qlora.dev/job" is the operator\'s own'),
        ({"annotations": {"qlora.dev/config": "x"}}, '"qlora.dev/config" is the operator\'s own'),
        ({"capabilities": ["SYS_ADMIN"]}, "IPC_LOCK"),
        ({"image": "evil"}, "image"),
        ({"volumes": [{"name": "a", "mountPath": "/a"}]}, "volume a must have exactly one of configMap"),
        (
            {"volumes": [{"name": "a", "mountPath": "/cache/", "hostPath": {"path": "/var"}}]},
            "emptyDir or ephemeral, not hostPath",
        ),
        (
            {"volumes": [{"name": "a", "mountPath": "/etc", "emptyDir": {}}]},
            "mountPath: /etc is at the trainer's own /etc/qlora",
        ),
        ({"volumes": [{"name": "a", "mountPath": "/tmp/x", "emptyDir": {}}]}, "the trainer's own /tmp"),
        (
            {"volumes": [{"name": n, "mountPath": "/a", "emptyDir": {}} for n in "ab"]},
            'volumes: "/a" is listed twice',
        ),
        ({"ephemeralStorage": "1Ti"}, "profiles.p.ephemeralStorage: 1Ti must not exceed"),
        ({"topologySpreadConstraints": [{"maxSkew": 1}]}, "topologyKey"),
    ],
    ids=str,
)
def test_a_wrong_profile_keeps_the_operator_from_starting(profile, said):
    with pytest.raises(ManifestError) as caught:
        config_with({"p": profile})
    assert str(caught.value).startswith("profiles")
    assert said in str(caught.value)
