"""helm on this repository's chart, and kubeconform on what is rendered."""

from __future__ import annotations

import json
import subprocess

import pytest

from charts.helm import Helm
from charts.kubernetes_schemas import LOCATION, close, kubernetes_schemas
from fixtures import skip_unless_ci
from qlora_api.crd import definitions
from qlora_api.job import GROUP, VERSION
from services.binaries import ToolMissingError, find_or_build
from services.tools import HELM, KUBECONFORM


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """No cluster: for what is rendered."""
    try:
        return Helm(find_or_build(HELM), tmp_path_factory.mktemp("helm"))
    except ToolMissingError as error:
        skip_unless_ci(str(error))
        raise


@pytest.fixture(scope="session")
def conform(tmp_path_factory):
    """Check manifests by Kubernetes' own schemas and by the CRD's; what is wrong with them."""
    try:
        binary, schemas = find_or_build(KUBECONFORM), kubernetes_schemas()
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    own = tmp_path_factory.mktemp("schemas")
    for definition in definitions().values():
        schema = close(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        singular = definition["spec"]["names"]["singular"]
        (own / f"{GROUP}-{VERSION}-{singular}.json").write_text(json.dumps(schema))
    locations = [f"--schema-location={folder}/{LOCATION}" for folder in (schemas, own)]

    def check(text: str) -> str:
        command = [binary, "-strict", "-skip", "PodMonitor,ServiceMonitor", *locations, "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == bool(done.stdout), done.stderr
        return done.stdout

    return check
