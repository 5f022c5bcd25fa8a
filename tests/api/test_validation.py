"""The types and the API server refuse the same manifests."""

from __future__ import annotations

import copy
import re

import pytest

from qlora_api import QLoRAJob
from qlora_api.crd import crd
from qlora_api.errors import ManifestError
from qlora_cli.manifest.crd_schema import without_nulls

from .api_server import refusals
from .manifests import VALID, manifest

SPEC = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
FULL = manifest(
    dataset__format="Messages",
    dataset__eval={"fraction": "0.1"},
    dataset__columns={"messages": "turns"},
    dataset__tolerance={"dropped": "0.5"},
    lora__targetModules=["q_proj"],
    lora__trainTokens=["<|im_start|>", " a\n"],
    training__evaluation={"everySteps": 10, "patience": 2, "prompts": ["Why?"]},
    parallelism={"workers": 4, "minWorkers": 2, "zeroStage": 2},
    scheduling={
        "queue": "team",
        "nodeSelector": {"gpu": "a"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    },
    evaluate={
        "tasks": [{"name": "arc_easy", "minimum": "0.5", "maximum": "1"}],
        "folder": "s3://b/tasks",
        "limit": 100,
    },
    tracking=[{"type": "WandB", "server": "https://wandb.example.com", "project": "support", "entity": "team"}],
)
ABSENT = object()
OTHER_TYPES = (None, True, False, 1, 1.5, "1", "", [], ["1"], [None], {}, {"a": "b"}, {"a": None})
DECIMALS = ("0", "0.5", "1", "1.0e-3", "2e-4", "5e9", ".5", "-1", "1e", " 1", "1\n", "nan", "1e999")
ADDRESSES = (
    "hf://org/name",
    "hf://",
    "s3://bucket/key",
    "s3://",
    "gs://b/k",
    "az://b/k",
    "pvc://c/k",
    "pvc://",
    "http://x/y",
    "S3://b/k",
)


def fields(node, path=()):
    """Yield the path and schema of each field; of lists of groups, those of the first item."""
    for name, child in node.get("properties", {}).items():
        yield (*path, name), child
        yield from fields(child, (*path, name))
        yield from fields(child.get("items", {}), (*path, name, 0))


def values(path, node):
    """Yield values around what a schema allows, and of other types."""
    if path[-1] in ("source", "destination", "folder"):
        yield from ADDRESSES
        yield from (value for value in OTHER_TYPES if value != "1")  # a local path, which 'qlora run' takes
        return
    yield from OTHER_TYPES
    for value in node.get("enum", ()):
        yield from (value, value.lower() if isinstance(value, str) else value + 1)
    for bound in ("minimum", "maximum"):
        if bound in node:
            yield from (node[bound] - 1, node[bound], node[bound] + 1)
    if "maxLength" in node:
        yield from ("a" * node["maxLength"], "a" * (node["maxLength"] + 1), "A_b", "a-", "a\n")
    if node.get("pattern", "").startswith("^[0-9]+"):
        yield from DECIMALS
    if "maxItems" in node:
        yield from (["a"] * node["maxItems"], ["a"] * (node["maxItems"] + 1))
    if "additionalProperties" in node:
        yield from ({str(i): "a" for i in range(node["maxProperties"] + more)} for more in (0, 1))


def changed(path, value, name=None):
    """Return the full spec with a field set or taken away, or under another name; None where it has no such list."""
    spec = copy.deepcopy(FULL["spec"])
    place = spec
    for step in path[:-1]:
        place = place[step] if isinstance(step, int) else place.setdefault(step, {})
    old = place.pop(path[-1], "1")
    if value is not ABSENT:
        place[name or path[-1]] = old if name else value
    return spec


def mutations():
    """Yield what is changed, and the spec."""
    for path, node in fields(SPEC):
        yield (path, "absent"), changed(path, ABSENT)
        snake = re.sub(r"([A-Z])", r"_\1", path[-1]).lower()
        if snake != path[-1]:
            yield (path, snake), changed(path, None, snake)
        for value in values(path, node):
            yield (path, value), changed(path, value)


def test_the_types_and_the_api_server_refuse_the_same_manifests():
    assert refusals(FULL["spec"], SPEC) == []
    compared, differences = 0, []
    for change, spec in mutations():
        try:
            QLoRAJob.from_manifest(without_nulls({**VALID, "spec": spec}))
            of_types = []
        except ManifestError as error:
            of_types = [str(error)]
        of_server = refusals(spec, SPEC)
        compared += 1
        if bool(of_types) != bool(of_server):
            differences.append((change, of_types, of_server))
    assert differences == []
    assert compared > 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"dataset__max_length": 64},
            "spec.dataset.max_length: unknown field; did you mean maxLength?",
            id="snake-case",
        ),
        pytest.param(
            {"output__destination": "hf://org/name"},
            'scheme "hf://" is not known here; use s3://, gs://',
            id="hub-as-destination",
        ),
        pytest.param({"model__source": "s3://"}, "has nothing after s3://; use hf://", id="no-bucket"),
    ],
)
def test_what_only_the_api_server_refused(changes, message):
    with pytest.raises(ManifestError) as caught:
        QLoRAJob.from_manifest(manifest(**changes))
    assert message in str(caught.value)
