"""JSON schemas of all kinds of Kubernetes, for kubeconform, from Kubernetes' own OpenAPI document.

The document is part of the Go module k8s.io/kubernetes, of which the tests' API server is built.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from services.binaries import module_dir, tools_dir
from services.tools import KUBE_APISERVER

Schema = dict[str, Any]
LOCATION = "{{.Group}}-{{.ResourceAPIVersion}}-{{.ResourceKind}}.json"
"""Template by which kubeconform finds a schema. Kinds are in lower case; the core group has no name and gets the
version's."""
REFERENCE = "#/definitions/"
NUMBERS_TOO = {
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": "integer",
    "io.k8s.apimachinery.pkg.api.resource.Quantity": "number",
}
"""Types that the OpenAPI document calls strings, with the other JSON type that the API server accepts for each."""


def kubernetes_schemas() -> Path:
    """Folder with a schema for each kind; made once for each version of Kubernetes.

    Raises:
        ToolMissingError: there is no Go, or it cannot get the module.

    """
    version = f"{KUBE_APISERVER.version}-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"
    folder = tools_dir() / f"kubernetes-schemas-{version}"
    if not folder.exists():
        unfinished = Path(mkdtemp(dir=tools_dir()))
        document = json.loads((module_dir(KUBE_APISERVER) / "api" / "openapi-spec" / "swagger.json").read_text())
        write_schemas(document["definitions"], unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return folder


def write_schemas(definitions: dict[str, Schema], folder: Path) -> None:
    """Write one file for each kind, with all that it refers to in it."""
    closed = {name: _definition(name, schema) for name, schema in definitions.items()}
    for name, schema in closed.items():
        for kind in schema.get("x-kubernetes-group-version-kind", ()):
            used = {n: closed[n] for n in _reached(name, closed)}
            text = json.dumps({"$ref": f"{REFERENCE}{name}", "definitions": used})
            (folder / f"{kind['group'] or kind['version']}-{kind['version']}-{kind['kind'].lower()}.json").write_text(
                text
            )


def close(schema: Any) -> Any:
    """Refuse what is not named, at every depth. The API server drops it, which is worse."""
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    names = {"properties": {name: close(entry) for name, entry in schema.get("properties", {}).items()}}
    closed = {key: close(value) for key, value in schema.items() if key != "properties"}
    if "properties" not in schema:
        return closed
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    return closed | names | ({} if is_open else {"additionalProperties": False})


def _definition(name: str, schema: Schema) -> Schema:
    return {"type": ["string", NUMBERS_TOO[name]]} if name in NUMBERS_TOO else close(schema)


def _reached(name: str, definitions: dict[str, Schema]) -> set[str]:
    """Names of a definition and all that it refers to."""
    reached, ahead = set(), [name]
    while ahead:
        here = ahead.pop()
        if here not in reached:
            reached.add(here)
            ahead += _references(definitions[here])
    return reached


def _references(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = schema.get("$ref")
        here = [own.removeprefix(REFERENCE)] if isinstance(own, str) else []
        return here + [name for value in schema.values() for name in _references(value)]
    return [name for item in schema for name in _references(item)] if isinstance(schema, list) else []
