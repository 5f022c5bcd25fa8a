"""The generated CustomResourceDefinition says what the types say."""

from __future__ import annotations

import re

import cel
import pytest

from qlora_api import QLoRAJob
from qlora_api.base import Model
from qlora_api.crd import crd
from qlora_api.errors import ManifestError, field_types
from qlora_api.spec import QLoRAJobSpec

from .manifests import VALID, manifest

FORBIDDEN = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "const", "title", "not"}


def schema():
    return crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes(node, path=""):
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from nodes(node[key], f"{path}[]")


def test_the_schema_is_structural():
    for path, node in nodes(schema()):
        assert "type" in node, path
        assert not FORBIDDEN & node.keys(), path


def test_no_field_is_a_float():
    assert [path for path, node in nodes(schema()) if node["type"] == "number"] == []


def test_every_text_list_and_map_of_the_spec_is_bounded():
    """Also what keeps the estimated cost of the CEL rules under the API server's budget."""
    bound = {"array": "maxItems", "string": "maxLength"}
    unbounded = [
        path
        for path, node in nodes(schema()["properties"]["spec"])
        if (node["type"] in bound and "enum" not in node and bound[node["type"]] not in node)
        or ("additionalProperties" in node and "maxProperties" not in node)
    ]
    assert unbounded == []


def test_every_field_of_the_spec_is_explained_but_those_named_as_in_kubernetes():
    bare = {
        path.rsplit(".", 1)[-1]
        for path, node in nodes(schema()["properties"]["spec"])
        if path and not node.get("description")
    }
    assert {name for name in bare if not name.endswith("[]")} <= {
        "key",
        "operator",
        "value",
        "effect",
        "tolerationSeconds",
        "nodeSelector",
        "priorityClassName",
        "tolerations",
    }


def test_every_field_has_a_name_in_camel_case():
    names = {path.rsplit(".", 1)[-1] for path, _ in nodes(schema()) if path and not path.endswith("[]")}
    assert {n for n in names if not re.fullmatch(r"[a-z][a-zA-Z0-9]*", n)} == set()


def test_columns_read_as_the_architecture_says():
    columns = crd()["spec"]["versions"][0]["additionalPrinterColumns"]
    assert [c["name"].upper() for c in columns if not c.get("priority")] == [
        "STATE",
        "REASON",
        "STEP",
        "LOSS",
        "ETA",
        "RESTARTS",
        "MEMORY",
        "AGE",
    ]
    paths = {path for path, _ in nodes(schema())} | {".metadata.creationTimestamp"}
    assert {c["jsonPath"] for c in columns} <= paths


def groups(model, path=()):
    yield path, model
    for name, inner in field_types(model).items():
        if inner is not None:
            yield from groups(inner, (*path, name))


def cel_violations(job):
    """Return the violations that the API server's CEL would report of a manifest with defaults filled in."""
    broken = []
    for path, model in groups(QLoRAJobSpec):
        found = [job["spec"]]
        for name in path:
            inner = [value.get(name, {}) for value in found if isinstance(value, dict)]
            found = [each for value in inner for each in (value if isinstance(value, list) else [value])]
        for value in found:
            if isinstance(value, dict) and value and issubclass(model, Model):
                broken += [r.message for r in model.rules if not cel.evaluate(r.cel, {"self": value})]
    return broken


def with_defaults(made):
    """As the API server defaults it, valid or not."""
    node = schema()["properties"]["spec"]

    def fill(value, node):
        for name, child in node.get("properties", {}).items():
            if name not in value and "default" in child:
                value[name] = child["default"]
            if isinstance(value.get(name), dict):
                fill(value[name], child)
        return value

    return {**made, "spec": fill(made["spec"], node)}


TENSORBOARD = {"type": "TensorBoard", "folder": "s3://logs/board"}
MLFLOW = {"type": "MLflow", "server": "https://mlflow.example.com", "project": "support"}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="valid"),
        pytest.param({"training__maxSteps": 5}, id="both-lengths"),
        pytest.param({"training__epochs": None}, id="no-length"),
        pytest.param({"training__globalBatchSize": 10, "parallelism__workers": 4}, id="batch-split"),
        pytest.param({"training__globalBatchSize": 8, "training__microBatchSize": 3}, id="micro-batch"),
        pytest.param({"training__globalBatchSize": 8, "training__microBatchSize": 4}, id="micro-batch-that-fits"),
        pytest.param({"dataset__lossOn": "Assistant"}, id="loss-on-assistant"),
        pytest.param({"dataset__lossOn": "Completion"}, id="loss-on-completion"),
        pytest.param({"dataset__format": "Messages", "dataset__lossOn": "Completion"}, id="completion-of-messages"),
        pytest.param({"dataset__format": "Text", "dataset__lossOn": "Completion"}, id="completion-of-text"),
        pytest.param({"dataset__chatTemplate": "x"}, id="template-without-messages"),
        pytest.param({"dataset__eval": {"fraction": "0.1"}}, id="eval-fraction"),
        pytest.param({"dataset__eval": {"fraction": "0.1", "source": "s3://b/e"}}, id="two-eval-sources"),
        pytest.param({"dataset__tolerance": {"evalInTrain": "0"}}, id="tolerance-of-no-evaluation-rows"),
        pytest.param(
            {"dataset__eval": {"fraction": "0.1"}, "dataset__tolerance": {"evalInTrain": "0"}}, id="tolerance"
        ),
        pytest.param({"training__evaluation": {"patience": 2}}, id="patience"),
        pytest.param({"training__evaluation": {"everySteps": 2}}, id="evaluation-of-no-rows"),
        pytest.param({"training__epochs": None, "training__maxSteps": 4, "training__warmupSteps": 4}, id="all-warmup"),
        pytest.param({"parallelism__offload": "Optimizer"}, id="offload-without-zero"),
        pytest.param({"parallelism__offload": "Optimizer", "parallelism__zeroStage": 2}, id="offload-with-zero"),
        pytest.param({"parallelism__zeroStage": 3, "quantization__type": "INT8"}, id="int8-zero-3"),
        pytest.param({"quantization__type": "None", "quantization__skipModules": ["q_proj"]}, id="none-skips"),
        pytest.param({"lora__dora": True, "quantization__type": "INT8"}, id="int8-dora"),
        pytest.param({"scheduling__gang": "Kueue"}, id="kueue-without-a-queue"),
        pytest.param({"scheduling__gang": "Kueue", "scheduling__queue": "team"}, id="kueue-with-a-queue"),
        pytest.param({"scheduling__gang": "Volcano"}, id="volcano-without-a-queue"),
        pytest.param({"tracking": [TENSORBOARD, MLFLOW, {"type": "WandB"}]}, id="all-tracking-tools"),
        pytest.param({"tracking": [MLFLOW, MLFLOW]}, id="tracking-tool-twice"),
        pytest.param({"tracking": [{"type": "TensorBoard"}]}, id="tensorboard-without-a-folder"),
        pytest.param({"tracking": [TENSORBOARD | {"server": "https://b"}]}, id="tensorboard-with-a-server"),
        pytest.param({"tracking": [TENSORBOARD | {"project": "p"}]}, id="tensorboard-with-a-project"),
        pytest.param({"tracking": [{"type": "MLflow"}]}, id="mlflow-without-a-server"),
        pytest.param({"tracking": [MLFLOW | {"folder": "s3://b/f"}]}, id="mlflow-with-a-folder"),
        pytest.param({"tracking": [MLFLOW | {"entity": "team"}]}, id="mlflow-with-an-entity"),
    ],
)
def test_cel_and_python_agree_on_every_rule(changes):
    made = manifest(**changes)
    try:
        QLoRAJob.from_manifest(made)
        in_python = []
    except ManifestError as error:
        in_python = [m.allowed for m in error.errors]
    in_cel = cel_violations(with_defaults(manifest(**changes)))
    assert bool(in_cel) == bool(in_python)
    assert set(in_python) <= set(in_cel)  # Python stops at the first of a group


@pytest.mark.parametrize(("text", "valid"), [("2e-4", True), ("1", True), ("0", False), ("1.5", False)])
def test_bounds_of_a_decimal_hold_in_cel_too(text, valid):
    node = schema()["properties"]["spec"]["properties"]["training"]["properties"]["learningRate"]
    assert re.search(node["pattern"], text)
    (rule,) = node["x-kubernetes-validations"]
    assert cel.evaluate(rule["rule"], {"self": text}) is valid


@pytest.mark.parametrize(
    ("source", "valid"), [("hf://a/b", True), ("pvc://claim/x", True), ("./folder", False), ("file:///x", False)]
)
def test_a_local_path_is_refused_by_the_api_server_alone(source, valid):
    node = schema()["properties"]["spec"]["properties"]["model"]["properties"]["source"]
    (rule,) = node["x-kubernetes-validations"]
    assert cel.evaluate(rule["rule"], {"self": source}) is valid
    QLoRAJob.from_manifest(manifest(model__source=source))


def test_what_a_resume_depends_on_is_immutable_and_the_rest_is_not():
    rules = schema()["properties"]["spec"]["x-kubernetes-validations"]
    fixed = {r["fieldPath"].removeprefix(".") for r in rules if "oldSelf" in r["rule"]}
    assert fixed == {"model", "dataset", "quantization", "lora", "training", "parallelism", "evaluate"}
    (output,) = schema()["properties"]["spec"]["properties"]["output"]["x-kubernetes-validations"]
    assert (output["rule"], output["fieldPath"]) == ("self.destination == oldSelf.destination", ".destination")
    (rule,) = [r["rule"] for r in rules if "oldSelf.lora" in r["rule"]]
    old = VALID["spec"] | {"lora": {"rank": 8}}
    assert cel.evaluate(rule, {"self": old, "oldSelf": old})
    for changed in ({"rank": 9}, {"rank": 8, "trainTokens": ["<|im_end|>"]}):
        assert not cel.evaluate(rule, {"self": old | {"lora": changed}, "oldSelf": old})


def test_an_immutable_field_that_may_be_absent_is_neither_added_nor_taken_away():
    rules = schema()["properties"]["spec"]["x-kubernetes-validations"]
    (rule,) = [r["rule"] for r in rules if "oldSelf.evaluate" in r["rule"]]
    without, with_tasks = VALID["spec"], VALID["spec"] | {"evaluate": {"tasks": [{"name": "arc_easy"}]}}
    assert cel.evaluate(rule, {"self": without, "oldSelf": without})
    assert cel.evaluate(rule, {"self": with_tasks, "oldSelf": with_tasks})
    assert not cel.evaluate(rule, {"self": with_tasks, "oldSelf": without})
    assert not cel.evaluate(rule, {"self": without, "oldSelf": with_tasks})
