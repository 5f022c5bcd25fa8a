"""Rights that the chart grants, and what fits what the operator and its trainers are."""

from __future__ import annotations

import pytest
import yaml
from pydantic import BaseModel

from charts.helm import REPOSITORY, one
from charts.test_manifests import CASES, values_of
from qlora_api.crd import crd, definitions
from qlora_api.errors import field_types
from qlora_api.spec import ParallelismSpec, QLoRAJobSpec
from qlora_operator.config import OperatorConfig
from qlora_operator.manifests.render import KEY_SECRET_TYPE
from qlora_operator.names import KEY_SECRET_PREFIX, METRICS_PORT

OPERATOR_GOLDEN = REPOSITORY / "tests" / "operator" / "manifests" / "golden"
READ = ("get", "list", "watch")
IN_NAMESPACES = {
    ("qlora.dev", "qlorajobs"): {*READ, "create", "patch", "delete"},
    ("qlora.dev", "qlorajobs/status"): {"patch"},
    ("qlora.dev", "qlorasweeps"): {*READ, "delete"},
    ("qlora.dev", "qlorasweeps/status"): {"patch"},
    ("batch", "jobs"): {*READ, "create", "delete"},
    ("", "pods"): {"list", "watch"},
    ("", "services"): {*READ, "create", "delete"},
    ("", "secrets"): {"create"},
    ("networking.k8s.io", "networkpolicies"): {"create"},
    ("", "events"): {"list", "watch"},
    ("events.k8s.io", "events"): {"create"},
    ("scheduling.volcano.sh", "podgroups"): {"get", "create"},
}
IN_THE_CLUSTER = {("", "nodes"): {"get"}}
MEMORY = {("", "configmaps"): {"get", "patch"}}


@pytest.fixture(scope="session", params=CASES)
def rendered(helm, request):
    """All objects of a golden case."""
    return helm.render(values_of(request.param))


def granted(role: dict) -> dict[tuple[str, str], set[str]]:
    rights: dict[tuple[str, str], set[str]] = {}
    for rule in role["rules"]:
        for key in ((g, r) for g in rule["apiGroups"] for r in rule["resources"]):
            rights.setdefault(key, set()).update(rule["verbs"])
    return rights


def roles_of_the_operator(objects: list[dict]) -> list[dict]:
    """Roles and cluster roles that are bound to something."""
    bound = {o["roleRef"]["name"] for o in objects if o["kind"] in ("RoleBinding", "ClusterRoleBinding")}
    return [o for o in objects if o["kind"] in ("Role", "ClusterRole") and o["metadata"]["name"] in bound]


# --------------------------------------------------------------------------------------------------------------- RBAC


def test_no_role_reads_secrets_or_mentions_exec_or_everything(rendered):
    for role in (o for o in rendered if o["kind"] in ("Role", "ClusterRole")):
        for rule in role["rules"]:
            words = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
            assert not words & {"*", "pods/exec", "pods/attach", "escalate", "bind", "impersonate"}
            assert "secrets" not in words or rule["verbs"] == ["create"]


def test_the_operator_creates_no_secret_but_keys_and_nobody_else_creates_these(helm):
    """Check that the expressions name what the operator makes; what they do is tried on a cluster."""
    for values in ({}, values_of("namespaced")):
        objects = helm.render(values)
        policy = one(objects, "ValidatingAdmissionPolicy", "-keys")["spec"]
        account = one(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
        (rule,) = policy["matchConstraints"]["resourceRules"]
        assert (policy["failurePolicy"], rule["resources"], rule["operations"]) == ("Fail", ["secrets"], ["CREATE"])
        text = str(policy)
        assert f"system:serviceaccount:qlora-system:{account}'" in text
        assert f"startsWith('{KEY_SECRET_PREFIX}')" in text
        assert KEY_SECRET_TYPE in text


def test_in_the_whole_cluster_the_operator_may_do_this_and_no_more(helm):
    cluster, memory = sorted(roles_of_the_operator(helm.render()), key=lambda r: r["kind"])
    assert granted(cluster) == IN_NAMESPACES | IN_THE_CLUSTER
    assert granted(memory) == MEMORY


def test_in_named_namespaces_nothing_is_granted_elsewhere(helm):
    objects = helm.render({"namespaces": ["team-a", "team-b"], "rbac": {"aggregate": False}})
    assert not [o for o in objects if o["kind"].startswith("ClusterRole")]
    roles = {r["metadata"]["namespace"]: granted(r) for r in roles_of_the_operator(objects)}
    assert roles.pop("qlora-system") == MEMORY
    assert roles == dict.fromkeys(("team-a", "team-b"), IN_NAMESPACES)


def test_the_one_config_map_that_may_be_written_is_named_and_the_charts_own(rendered):
    for role in (o for o in rendered if o["kind"] == "Role"):
        for rule in role["rules"]:
            if "configmaps" in rule["resources"]:
                (name,) = rule["resourceNames"]
                assert "data" not in one(rendered, "ConfigMap", name), "an upgrade would undo what the operator wrote"


def test_bindings_name_the_account_of_the_deployment(rendered):
    account = one(rendered, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
    for binding in (o for o in rendered if o["kind"] in ("RoleBinding", "ClusterRoleBinding")):
        assert [(s["name"], s["namespace"]) for s in binding["subjects"]] == [(account, "qlora-system")]


# ---------------------------------------------------------------------------------------------------------------- pods


def test_the_operators_pod_passes_the_restricted_profile(rendered):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    spec = one(rendered, "Deployment")["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert {next(iter(set(v) - {"name"})) for v in spec["volumes"]} <= {"configMap", "emptyDir"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_there_is_one_operator_at_a_time(rendered):
    spec = one(rendered, "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_several_operators_have_a_lease_a_budget_and_nodes_of_their_own(helm):
    objects = helm.render({"replicas": 2})
    deployment = one(objects, "Deployment")["spec"]
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (2, "RollingUpdate")
    pod = deployment["template"]
    (spread,) = pod["spec"]["topologySpreadConstraints"]
    for selector in (spread["labelSelector"], one(objects, "PodDisruptionBudget")["spec"]["selector"]):
        assert selector["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (config_map,) = [o for o in objects if o["kind"] == "ConfigMap" and "data" in o]
    config = OperatorConfig.model_validate(yaml.safe_load(config_map["data"]["config.yaml"]))
    role = one(objects, "Role", "-lease")
    (name,) = role["rules"][0]["resourceNames"]
    assert config.lease == f"{role['metadata']['namespace']}/{name}"
    assert granted(role) == {("coordination.k8s.io", "leases"): {"get", "patch", "create"}}


def test_one_operator_has_no_right_to_leases(rendered):
    roles = [o for o in rendered if o["kind"] in ("Role", "ClusterRole")]
    assert not [role for role in roles if ("coordination.k8s.io", "leases") in granted(role)]
    assert not [o for o in rendered if o["kind"] == "PodDisruptionBudget"]


def test_the_operator_reads_the_config_that_the_chart_writes(rendered, tmp_path):
    """Every key that is written is known, and every key that is known is written."""
    (config_map,) = [o for o in rendered if o["kind"] == "ConfigMap" and "data" in o]
    text = config_map["data"]["config.yaml"]
    (tmp_path / "config.yaml").write_text(text)
    config = OperatorConfig.read(tmp_path / "config.yaml")
    assert keys(yaml.safe_load(text)) == keys(config.model_dump(by_alias=True))
    container = one(rendered, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert container["ports"] == [{"name": "metrics", "containerPort": config.metrics_port}]
    namespace, _, name = config.memory_config_map.partition("/")
    assert one(rendered, "ConfigMap", name)["metadata"]["namespace"] == namespace


def keys(values: object) -> object:
    return {k: keys(v) for k, v in values.items()} if isinstance(values, dict) else None


def test_a_changed_config_restarts_the_operator(helm):
    checksums = {
        one(helm.render(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        for values in ({}, {"gang": "None"})
    }
    assert len(checksums) == 2


# --------------------------------------------------------------------------------------- what fits the trainers' pods


def trainer_pods() -> list[dict]:
    """Pod templates that the operator makes."""
    manifests = [m for path in OPERATOR_GOLDEN.glob("*/want.yaml") for m in yaml.safe_load_all(path.read_text())]
    return [m["spec"]["template"] for m in manifests if m["kind"] == "Job"]


def selects(selector: dict, labels: dict) -> bool:
    named = all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
    return named and all(labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", ()))


def test_monitor_and_network_policy_select_the_operators_pods_and_no_others(helm):
    objects = helm.render(values_of("namespaced"))
    monitor = one(objects, "PodMonitor")["spec"]
    policy = one(objects, "NetworkPolicy", "-trainers")["spec"]
    assert trainer_pods()
    for pod in trainer_pods():
        labels = pod["metadata"]["labels"]
        ports = [p["name"] for p in pod["spec"]["containers"][0].get("ports", ())]
        assert selects(policy["podSelector"], labels)
        assert selects(monitor["selector"], labels) == bool(ports)
    operator = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert not selects(policy["podSelector"], operator)
    assert not selects(monitor["selector"], operator)


def test_the_ports_of_all_ranks_are_open_to_the_operator_and_to_monitoring(helm):
    policy = one(helm.render(values_of("namespaced")), "NetworkPolicy", "-trainers")["spec"]
    most = next(m.le for m in ParallelismSpec.model_fields["gpus_per_worker"].metadata if hasattr(m, "le"))
    ranges = [rule["ports"] for rule in policy["ingress"] if "ports" in rule]
    assert ranges == 2 * [[{"port": METRICS_PORT, "endPort": METRICS_PORT + most - 1}]]


# ----------------------------------------------------------------------------------------------------- admission policy


def fields(model: type[BaseModel], above: str = "") -> list[str]:
    """Dotted paths of all fields of a type, by their names in a manifest."""
    found = []
    for name, inner in field_types(model).items():
        found += [f"{above}{name}", *(fields(inner, f"{above}{name}.") if inner is not None else ())]
    return found


def test_the_policy_looks_at_every_field_that_names_a_secret_or_a_place(helm):
    """A field that is new in the API fails here until the policy knows it."""
    messages = {
        v["messageExpression"]
        for v in one(helm.render(), "ValidatingAdmissionPolicy", "operator")["spec"]["validations"]
    }
    naming = [f for f in fields(QLoRAJobSpec) if f.endswith(("credentials", "source", "destination", "folder"))]
    assert len(naming) >= 9
    for field in naming:
        for path in paths_of(field):
            assert any(f"'spec.{path}: " in message for message in messages), path


def paths_of(field: str) -> list[str]:
    """Paths of a field of the spec in a manifest: one for each entry that its list may have."""
    group, _, rest = field.partition(".")
    info = next(f for f in QLoRAJobSpec.model_fields.values() if f.alias == group)
    most = next((m.max_length for m in info.metadata if hasattr(m, "max_length")), None)
    return [field] if most is None else [f"{group}[{i}].{rest}" for i in range(most)]


def test_the_policy_is_bound_and_refuses_when_in_doubt(rendered):
    policies = [o for o in rendered if o["kind"] == "ValidatingAdmissionPolicy"]
    for policy in policies:
        binding = one(rendered, "ValidatingAdmissionPolicyBinding", policy["metadata"]["name"])
        assert policy["spec"]["failurePolicy"] == "Fail"
        assert binding["spec"]["policyName"] == policy["metadata"]["name"]
        assert binding["spec"]["validationActions"] == ["Deny"]
        (rule,) = policy["spec"]["matchConstraints"]["resourceRules"]
        if rule["resources"] != ["secrets"]:
            (resource,) = rule["resources"]
            assert (rule["apiGroups"], resource in definitions()) == ([crd()["spec"]["group"]], True)
