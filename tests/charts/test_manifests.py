"""The chart's manifests: as they were looked at, valid for Kubernetes, refused where values are wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import yaml

from charts.helm import CHART, REPOSITORY, HelmError, one
from fixtures import check_golden
from qlora_api.crd import definitions

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
JOBS = sorted((REPOSITORY / "examples" / "cluster").glob("*.yaml"))
DEFINITION = re.compile(r"\nkind: CustomResourceDefinition\n.*?\n(spec:\n.*?)(?=\n---)", re.DOTALL)


def values_of(case: str) -> dict:
    return yaml.safe_load((GOLDEN / case / "values.yaml").read_text())


def without_definition(text: str) -> str:
    """The CRDs' specs have their own tests, and would be most of a golden file."""
    for found in DEFINITION.findall(text):
        text = text.replace(found, "spec: …")
    return text


# -------------------------------------------------------------------------------------------------------------- golden


def test_there_are_golden_cases():
    assert {"default", "namespaced", "cpu"} <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_as_they_were_looked_at(helm, case):
    check_golden(GOLDEN / case / "want.yaml", without_definition(helm.template(values_of(case))))


def test_what_is_generated_is_fresh():
    """The chart's copies of the CRDs, and the table of values."""
    command = [sys.executable, REPOSITORY / "charts" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rendered_definitions_are_the_generated_ones(helm):
    rendered = {o["metadata"]["name"]: o["spec"] for o in helm.render() if o["kind"] == "CustomResourceDefinition"}
    assert rendered == {each["metadata"]["name"]: each["spec"] for each in definitions().values()}


# --------------------------------------------------------------------------------------------------------------- valid


def test_the_chart_passes_helms_linter(helm):
    helm("lint", "--strict", CHART)


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_valid_for_kubernetes(helm, conform, case):
    assert conform(helm.template(values_of(case))) == ""


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_example_jobs_are_valid_for_the_definition(conform, path):
    assert conform(path.read_text()) == ""


def test_there_are_example_jobs():
    assert {p.name for p in JOBS} >= {"one-gpu.yaml", "eight-gpus.yaml", "two-nodes.yaml", "spot.yaml"}


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("replicas: 1", "replicas: one", "got string, want"),
        ("replicas: 1", "replica: 1", "additional properties 'replica' not allowed"),
        ("failureThreshold: 60", "failureTreshold: 60", "additional properties 'failureTreshold' not allowed"),
    ],
)
def test_the_schemas_find_errors(helm, conform, right, wrong, complaint):
    """A control: schemas that take everything would look like success."""
    assert complaint in conform(helm.template().replace(right, wrong))


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"gang": "auto"}, "at '/gang': value must be one of 'Auto', 'Native', 'Kueue', 'Volcano', 'None'"),
        ({"trainer": {"cup": 4}}, "at '/trainer': additional properties 'cup' not allowed"),
        ({"trainer": {"memory": "32GiB"}}, "at '/trainer/memory': '32GiB' does not match pattern"),
        ({"trainer": {"image": {"digest": "sha256:1"}}}, "at '/trainer/image/digest': 'sha256:1' does not match"),
        ({"trainer": {"env": [{"name": "A", "valueFrom": {}}]}}, "additional properties 'valueFrom' not allowed"),
        ({"namespaces": "team-a"}, "at '/namespaces': got string, want array"),
        ({"namespaces": ["team_a"]}, "at '/namespaces/0': 'team_a' does not match pattern"),
        ({"sharedCacheUri": "/cache"}, "at '/sharedCacheUri': '/cache' does not match pattern"),
        ({"metrics": {"port": 0}}, "at '/metrics/port': minimum: got 0, want 1"),
        ({"crd": {"install": False}}, "additional properties 'crd' not allowed"),
        ({"trainer": {"image": {"repository": ""}}}, "at '/trainer/image/repository': minLength: got 0, want 1"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name(helm, values, complaint):
    with pytest.raises(HelmError, match=re.escape(complaint)):
        helm.template(values)


def properties(schema: dict, definitions: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], dict]:
    """Paths of all values that a schema names, with the schema of each."""
    found = {}
    for name, entry in schema.get("properties", {}).items():
        target = definitions[entry["$ref"].rpartition("/")[2]] if "$ref" in entry else entry
        found |= {(*path, name): target, **properties(target, definitions, (*path, name))}
    return found


METADATA = {
    "any cloud": ("169.254.169.254", "fe80::a9fe:a9fe"),
    "AWS, instances": ("fd00:ec2::254",),
    "AWS, containers and EKS Pod Identity": ("169.254.170.2", "169.254.170.23", "fd00:ec2::23"),
    "Google Cloud": ("fd20:ce::254",),
    "Azure": ("168.63.129.16",),
    "Oracle Cloud": ("192.0.0.192", "fd00:c1::a9fe:a9fe"),
    "Alibaba Cloud": ("100.100.100.200", "fd00:100::100:200"),
    "Scaleway": ("169.254.42.42", "fd00:42::42"),
    "Akamai": ("fd00:a9fe:a9fe::1",),
    "by NAT64": ("64:ff9b::a9fe:a9fe",),
}


@pytest.mark.parametrize("cloud", METADATA)
def test_trainers_reach_no_metadata_address_by_the_default_egress(helm, cloud):
    policy = one(helm.render({"networkPolicy": {"trainers": {"namespaces": ["team"]}}}), "NetworkPolicy", "-trainers")
    blocks = [peer["ipBlock"] for rule in policy["spec"]["egress"] for peer in rule.get("to", ()) if "ipBlock" in peer]

    def reached(text):
        address = ip_address(text)
        return any(
            address in ip_network(block["cidr"]) and not any(address in ip_network(n) for n in block["except"])
            for block in blocks
        )

    assert not [address for address in METADATA[cloud] if reached(address)]
    assert reached("203.0.113.7")
    assert reached("2001:db8::7")


def test_pods_ask_dns_at_the_ports_of_the_cluster(helm):
    restricted = {"operator": {"enabled": True}, "trainers": {"namespaces": ["team"]}, "dnsPorts": [53, 5353]}
    for policy in (o for o in helm.render({"networkPolicy": restricted}) if o["kind"] == "NetworkPolicy"):
        asked = policy["spec"]["egress"][0]["ports"]
        assert {(rule["port"], rule["protocol"]) for rule in asked} == {
            (p, t) for p in (53, 5353) for t in ("UDP", "TCP")
        }


def test_the_operator_may_write_little(helm):
    (container,) = (pod := one(helm.render(), "Deployment")["spec"]["template"]["spec"])["containers"]
    assert container["resources"]["limits"]["ephemeral-storage"] == "1Gi"
    assert "ephemeral-storage" in container["resources"]["requests"]
    assert [v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v] == [{"sizeLimit": "64Mi"}]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_a_job_asks_for_no_disk_where_the_chart_says_so(helm):
    def disk(value):
        config = one(helm.render({"trainer": {"ephemeralStorage": value}}), "ConfigMap", "qlora-operator")
        return yaml.safe_load(config["data"]["config.yaml"])["trainer"]["ephemeralStorage"]

    assert [disk(""), disk("5Gi"), disk(1000)] == [None, "5Gi", "1000"]


def test_every_value_is_documented_used_and_closed():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    documented = set(re.findall(r"^\| `([\w.]+)` \|", (CHART / "README.md").read_text(), re.MULTILINE))
    templates = "".join(p.read_text() for p in (CHART / "templates").iterdir())
    for path, entry in properties(schema, schema["definitions"]).items():
        if path[0] in ("global", "resources"):
            continue  # read by other charts; Kubernetes' own
        here = values
        for name in path:
            here = here[name]
        if "properties" in entry:
            assert entry["additionalProperties"] is False, path
        else:
            assert ".".join(path) in documented, f"{path} has no '# --' comment in values.yaml"
            assert re.search(rf"\.{path[-1]}\b", templates), f"{path} is read by no template"
