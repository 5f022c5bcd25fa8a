"""Each job has a key that no decision knows, and trainers are told what to accept without it."""

from __future__ import annotations

import base64
import json

import pytest

from operator_builders import CONFIG, UID, attempt, child, decide, job, observed, running
from qlora_api.contract import TrainerConfig
from qlora_api.status import QLoRAJobStatus
from qlora_operator.act.children import collection_of, with_new_key
from qlora_operator.config import OperatorConfig
from qlora_operator.decide.decision import Decision
from qlora_operator.manifests import render

NAME = f"qlora-key-{UID}"


def config_of(planned: Decision) -> TrainerConfig:
    annotations = planned.create[-1]["spec"]["template"]["metadata"]["annotations"]
    return TrainerConfig.model_validate_json(annotations["qlora.dev/config"])


@pytest.mark.parametrize("prepares", [True, False])
def test_the_key_is_made_before_the_first_pod_and_mounted_as_a_file(prepares):
    config = CONFIG.model_copy(update={"prepare": CONFIG.prepare.model_copy(update={"enabled": prepares})})
    planned = decide(job(), observed(), config)
    secret, made = planned.create[0], planned.create[-1]
    assert (secret["kind"], secret["metadata"]["name"], secret["immutable"]) == ("Secret", NAME, True)
    (owner,) = secret["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("QLoRAJob", UID)
    pod = made["spec"]["template"]["spec"]
    volume = next(v for v in pod["volumes"] if v["name"] == "key")
    assert volume["secret"] == {"secretName": NAME, "defaultMode": 0o440}
    mount = next(m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "key")
    assert mount["readOnly"] is True
    assert config_of(planned).key_file == f"{mount['mountPath']}/key"
    assert NAME not in json.dumps(pod["containers"])


def test_a_decision_has_no_key_and_each_create_another_one():
    secret = render.key_secret(job())
    assert "data" not in secret
    first, second = (with_new_key(secret)["data"]["key"] for _ in range(2))
    assert first != second
    assert len(bytes.fromhex(base64.b64decode(first).decode())) == 32
    assert with_new_key({"kind": "Job"}) == {"kind": "Job"}
    assert collection_of(secret, "team") == "/api/v1/namespaces/team/secrets"


def test_a_job_that_began_with_a_key_accepts_nothing_unsigned():
    first = decide(job(), observed())
    begun = first.status.attempts[0]
    assert begun.key_secret == NAME
    assert config_of(first).accepts_unsigned is False
    ended = begun.model_copy(update={"end_time": begun.start_time, "reason": "Preempted"})
    again = decide(job(QLoRAJobStatus(attempts=[ended], start_time=begun.start_time)), observed(after=3600))
    assert again.status.attempts[-1].number == 2
    assert config_of(again).accepts_unsigned is False


def test_a_job_that_began_before_there_were_keys_goes_on_as_before():
    began = QLoRAJobStatus(attempts=[attempt(1, "Preempted")], start_time=attempt(1).start_time)
    second = decide(job(began), observed(after=3600))
    assert second.create[0]["kind"] == "Secret", "its workers need one to know each other"
    assert config_of(second).accepts_unsigned is True
    closed = second.status.attempts[-1].model_copy(update={"end_time": began.start_time, "reason": "Preempted"})
    third = decide(
        job(second.status.model_copy(update={"attempts": [began.attempts[0], closed]})), observed(after=9000)
    )
    assert config_of(third).accepts_unsigned is True, "its checkpoints may still be those of its first attempt"


def test_an_attempt_of_an_earlier_version_goes_on_untouched_through_an_upgrade():
    planned = decide(job(running()), observed(child(ready=1)))
    assert planned.create == ()
    assert planned.delete == ()


def test_the_workers_of_a_job_are_reached_by_its_own_pods_alone():
    policy = render.workers_policy(job(workers=2), CONFIG)
    own = {"matchLabels": {"qlora.dev/job-uid": UID, "app.kubernetes.io/component": "trainer"}}
    peers, metrics = policy["spec"]["ingress"]
    assert policy["spec"]["podSelector"] == own
    assert peers == {"from": [{"podSelector": own}]}
    assert metrics == {"ports": [{"port": 9400, "endPort": 9400, "protocol": "TCP"}]}
    pod = decide(job(workers=2), observed()).create[-1]["spec"]["template"]
    assert own["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_who_reads_metrics_is_the_charts_to_say_where_it_has_a_policy():
    restricted = OperatorConfig.model_validate(
        {**CONFIG.model_dump(), "network_policy": {"restricted_namespaces": ["team"]}}
    )
    assert len(render.workers_policy(job(workers=2), restricted)["spec"]["ingress"]) == 1


@pytest.mark.parametrize(("workers", "enabled", "count"), [(1, True, 0), (2, True, 1), (2, False, 0)])
def test_a_network_policy_is_made_where_workers_need_ports(workers, enabled, count):
    config = CONFIG.model_copy(update={"network_policy": CONFIG.network_policy.model_copy(update={"workers": enabled})})
    kinds = [made["kind"] for made in decide(job(workers=workers), observed(), config).create]
    assert kinds.count("NetworkPolicy") == count
